"""Attention inside the documents of packed rows, without a mask.

Where positions restart in a row, transformers keeps attention inside documents by a mask, bool [B, 1, S, S]: no flash
kernel takes one, and eight rows of 32k tokens need 8 GB for it. Here the rows, laid end to end, are one sequence of
documents, each attended to alone: by ``torch.nn.attention.varlen`` on a GPU that has its kernel, else by scaled
dot-product attention, documents of about a length together. Filling at the end of a row is a document as well.

:func:`adopt` prepares a model once; its callers pass the arguments that :func:`packed` returns. Calls without them (for
example generation), and models with a :func:`find_attention_problem`, use transformers' own attention with a mask.

Shape legend: B rows, S positions, T = B·S tokens, N documents, P tokens with the filling of documents, H heads (those
of keys and values may be fewer), D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trace_ds.models.families import FAMILIES
from trace_ds.parallel.device import to_device

ATTENTION_NAME = "trace_ds_documents"  # among transformers' implementations of attention
# Documents no longer than the last are filled up to one of these lengths: few calls, whatever the corpus. A document's
# numbers depend on its own length alone, never on what shares its batch; longer ones share a call with equals only.
LENGTHS = np.array((16, 24, 32, 48, 64, 96, 128))


@dataclass(frozen=True)
class Calls:
    """The documents in the order of the calls that attend to them.

    Attributes:
        shapes: number of documents and their length, of each call.
        places_P: int64, the token at each place (filling repeats its document's last); None: the tokens as they are.
        back_T: int64, the place of each token; None likewise.
    """

    shapes: list[tuple[int, int]]
    places_P: torch.Tensor | None
    back_T: torch.Tensor | None


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of a batch.

    Attributes:
        starts_N1: int32, on the device: where each begins among the T tokens, and T (known as cu_seq_lens).
        lengths_N: int64, on the host.
        input_T, token_U: int64, on the device, where documents share U tokens of the input (:func:`shared_prefixes`):
            the input of each token, and one of the tokens of each input. None: T tokens are the input.
    """

    starts_N1: torch.Tensor
    lengths_N: np.ndarray
    input_T: torch.Tensor | None = None
    token_U: torch.Tensor | None = None

    @classmethod
    def of(cls, position_ids_BS: torch.Tensor, device: torch.device) -> PackedDocuments:
        """One begins with every row, and wherever a position does not follow the one before (on the host: no wait)."""
        begins_BS = np.ones(position_ids_BS.shape, dtype=bool)
        begins_BS[:, 1:] = np.diff(position_ids_BS.cpu().numpy(), axis=1) != 1
        starts_N1 = np.append(np.flatnonzero(begins_BS), begins_BS.size)
        return cls(_on(device, starts_N1.astype(np.int32)), np.diff(starts_N1))

    @functools.cached_property
    def calls(self) -> Calls:
        lengths_N = self.lengths_N
        if len(np.unique(lengths_N)) == 1:
            return Calls([(len(lengths_N), int(lengths_N[0]))], None, None)
        starts_N = np.cumsum(lengths_N) - lengths_N
        filled_N = LENGTHS[np.searchsorted(LENGTHS, lengths_N).clip(max=len(LENGTHS) - 1)]
        filled_N = np.maximum(filled_N, lengths_N)
        shapes, places, real = [], [], []
        for length in np.unique(filled_N).tolist():
            here = filled_N == length
            of_document = np.arange(length), lengths_N[here, None]
            shapes.append((int(here.sum()), length))
            places.append((starts_N[here, None] + np.minimum(of_document[0], of_document[1] - 1)).ravel())
            real.append(np.less(*of_document).ravel())
        places_P, back_T = np.concatenate(places), np.empty(lengths_N.sum(), dtype=np.int64)
        real_T = np.flatnonzero(np.concatenate(real))
        back_T[places_P[real_T]] = real_T
        device = self.starts_N1.device
        return Calls(shapes, _on(device, places_P), _on(device, back_T))


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    return to_device(torch.from_numpy(array), device)


def find_attention_problem(model: Any) -> str | None:
    """Return why a model keeps the attention of transformers, or None if :func:`attend` can serve it.

    Sliding windows are not made; sinks and soft caps no family here has.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        return f"the attention of the family {config.model_type} is not known"
    if config._attn_implementation not in ("sdpa", ATTENTION_NAME):
        return f"it is run with {config._attn_implementation} attention"
    kinds = set(getattr(config, "layer_types", None) or ())
    if "linear_attention" in kinds:
        return "its layers have linear attention"
    if kinds != {"full_attention"} if kinds else getattr(config, "sliding_window", None):
        return "its layers have a sliding window"
    return None


def adopt(model: Any) -> None:
    """Switch a model built with "sdpa" to :func:`attend`, unless :func:`find_attention_problem` gives a reason."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if find_attention_problem(model) is not None:
        return
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)  # of calls without documents
    model.config._attn_implementation = ATTENTION_NAME
    model.config.output_router_logits = False  # a loss that nobody asks for would be made with the attention mask


def packed(model: Any, position_ids_BS: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments (besides the ids) that keep attention inside the documents of packed rows.

    Args:
        position_ids_BS: int64, on the host, restarting with each document and with the filling.

    ``use_cache=False`` matters: with a cache, transformers' own attention does not stay inside documents.
    """
    inputs: dict[str, Any] = {"position_ids": to_device(position_ids_BS, device), "use_cache": False}
    if is_adopted(model):
        inputs |= _arguments(PackedDocuments.of(position_ids_BS, device))
    return inputs


def _arguments(documents: PackedDocuments) -> dict[str, Any]:
    # Four dimensions are a mask ready-made to transformers: it makes none, nor looks at the positions, and passes it
    # on. Should the documents get lost on the way, no attention takes it for one.
    return {"documents": documents, "attention_mask": documents.starts_N1[None, None, None]}


def is_adopted(model: Any) -> bool:
    return bool(model.config._attn_implementation == ATTENTION_NAME)


def common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of leading tokens that are equal."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(ids), len(others)))


def shared_prefixes(
    documents: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the arguments of a forward pass of an adopted model over documents, and where their tokens lie in it.

    What a document has in common with the beginning of the one before it (so sort them) is computed once: the input is
    one row of U tokens, and attention alone sees whole documents. The places, int64 in 0 … U - 1, are one array a
    document.
    """
    ids: list[int] = []
    positions: list[int] = []
    places: list[np.ndarray] = []
    for before, document in pairwise([(), *documents]):
        shared = common_prefix_length(before, document)
        own = np.arange(len(ids), len(ids) + len(document) - shared)
        places.append(np.concatenate([places[-1][:shared], own]) if shared else own)
        ids += document[shared:]
        positions += range(shared, len(document))
    lengths_N, input_T = np.array([len(place) for place in places]), np.concatenate(places)
    starts_N1 = _on(device, np.append(0, np.cumsum(lengths_N)).astype(np.int32))
    token_U = np.unique(input_T, return_index=True)[1]
    shares = (_on(device, input_T), _on(device, token_U)) if len(token_U) < len(input_T) else (None, None)
    inputs = {"input_ids": _on(device, np.array([ids])), "position_ids": _on(device, np.array([positions]))}
    return inputs | {"use_cache": False} | _arguments(PackedDocuments(starts_N1, lengths_N, *shares)), places


def attend(
    module: Any,
    query_BHSD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: PackedDocuments | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside documents, as transformers calls attention; ([B, S, H, D of the values], no weights)."""
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query_BHSD, key_BHSD, value_BHSD, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    rows, size = len(query_BHSD), value_BHSD.shape[-1]
    if query_BHSD.shape[-1] > size:  # DeepSeek's values are narrower than its keys, which no flash kernel takes
        value_BHSD = functional.pad(value_BHSD, (0, query_BHSD.shape[-1] - size))
    query_THD, key_THD, value_THD = (
        tensor.transpose(1, 2).flatten(0, 1) for tensor in (query_BHSD, key_BHSD, value_BHSD)
    )
    if documents.input_T is not None:
        query_THD, key_THD, value_THD = (t.index_select(0, documents.input_T) for t in (query_THD, key_THD, value_THD))
    if dropout == 0.0 and _has_kernel(query_THD):
        output_THD = _by_kernel(documents, query_THD, key_THD, value_THD, scaling)
    else:
        output_THD = _by_length(documents, query_THD, key_THD, value_THD, scaling, dropout)
    if documents.token_U is not None:
        output_THD = output_THD.index_select(0, documents.token_U)
    return output_THD[..., :size].unflatten(0, (rows, -1)), None


def _has_kernel(query_THD: torch.Tensor) -> bool:
    """Whether torch's flash kernel of variable lengths takes tensors like these."""
    return (
        query_THD.device.type == "cuda"
        and query_THD.dtype in (torch.bfloat16, torch.float16)
        and query_THD.shape[-1] % 8 == 0
        and query_THD.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query_THD.device) >= (8, 0)
    )


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _by_kernel(
    documents: PackedDocuments,
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts_N1, longest = documents.starts_N1.to(query_THD.device), int(documents.lengths_N.max())
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in _parameters(varlen_attn):  # from torch 2.12 on
        options["enable_gqa"] = True
    else:
        key_THD, value_THD = (_repeated(tensor, query_THD.shape[1]) for tensor in (key_THD, value_THD))
    kernel: Any = varlen_attn  # without return_aux it gives the output alone, which its annotation hides
    return kernel(query_THD, key_THD, value_THD, starts_N1, starts_N1, longest, longest, **options)


def _by_length(
    documents: PackedDocuments,
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Scaled dot-product attention, a call for each length of documents.

    Filling comes after its document's tokens, so that none of them sees it, and no gradient comes from it.
    """
    calls, tensors = documents.calls, [query_THD, key_THD, value_THD]
    if query_THD.device.type != "cpu":  # other devices' kernels without a limit on types want as many heads
        tensors[1:] = (_repeated(tensor, query_THD.shape[1]) for tensor in tensors[1:])
    if calls.places_P is not None:
        tensors = [tensor.index_select(0, calls.places_P.to(tensor.device)) for tensor in tensors]
    parts = zip(*(tensor.split([n * length for n, length in calls.shapes]) for tensor in tensors), strict=True)
    outputs = []
    for shape, part in zip(calls.shapes, parts, strict=True):
        query_NHLD, key_NHLD, value_NHLD = (tensor.unflatten(0, shape).transpose(1, 2) for tensor in part)
        output_NHLD = functional.scaled_dot_product_attention(
            query_NHLD, key_NHLD, value_NHLD, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(output_NHLD.transpose(1, 2).flatten(0, 1))
    output_PHD = torch.cat(outputs)
    if calls.back_T is None:
        return output_PHD
    return output_PHD.index_select(0, calls.back_T.to(output_PHD.device))


def _repeated(tensor_THD: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head as often as there are heads of queries for it."""
    return tensor_THD.repeat_interleave(heads // tensor_THD.shape[1], dim=1)
