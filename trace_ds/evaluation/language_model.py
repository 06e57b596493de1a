"""A Hugging Face model as metrics need it: load it, score given tokens, continue greedily.

    with loaded(path, tokenizer, settings) as model:
        scores = model.score([Sequence((1, 5, 9, 2), first=2)])

Batches are made of sequences of similar length, filled at the *right* and run without an attention mask: attention is
causal and experts drop no token, so a filled position can influence no real one (in fp32 the same as one by one to
1e-5; in bf16 another batch size moves the last digits of a matrix product, and with them a close decision).
Log-probabilities are float32 whatever the model's type. The order of the batches depends on the input only, so a rerun
on the same machine gives the same bits.

Shape legend: B rows of a batch, S positions, V vocabulary, N scored tokens of a batch, P places that predict them.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from trace_ds.errors import UserError
from trace_ds.models.attention import packed
from trace_ds.parallel.device import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trace_ds.config.sections.training import TrainingConfig
    from trace_ds.parallel.world import World

LOGITS_PER_FORWARD = 1 << 28  # one GiB of float32 logits
TOKENS_PER_FORWARD = 1 << 16
Advance = Callable[[int], None]  # hears how many more of what is counted are done
_T = TypeVar("_T")
R = TypeVar("R")


class Diverged(ArithmeticError):
    """The model gives log-probabilities that are not finite: no score of it means anything."""


@dataclass(frozen=True)
class Sequence:
    """Token ids, of which those from index ``first`` on are scored (``first`` >= 1: the first has no context)."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of the scored tokens of one sequence, in order.

    Attributes:
        log_prob: float32, natural log-probability of the token given all before it.
        is_argmax: bool, whether the token is the model's most probable one there.
    """

    log_prob: np.ndarray
    is_argmax: np.ndarray


@dataclass(frozen=True)
class ModelSettings:
    """How models are run; all but ``batch_rows`` change scores and belong to the identity of a result."""

    dtype: str  # bf16 or fp32
    add_bos: bool
    add_eos: bool
    batch_rows: int


@dataclass(frozen=True)
class Sharding:
    """``ep`` ranks share a model's experts; at ``zero_stage`` 3 each holds a part of every other weight, too."""

    ep: int = 1
    zero_stage: int = 0

    @property
    def whole(self) -> bool:
        """Every rank holds the whole model."""
        return self.ep == 1 and self.zero_stage == 0


@dataclass(eq=False)
class LanguageModel:
    """A causal language model with the tokenizer of the run; made by :func:`loaded`.

    With a ``world`` of several processes each takes every so many-th *batch*; all processes call the same methods and
    get all results. The batches are those of a single process, and where each holds the whole model so are the numbers,
    bit for bit on the same kind of device.

    In ``lockstep`` a model is sharded: its ranks exchange tokens or weights in every layer, so all of them make a
    forward pass or none, and numbers are those of a single process up to rounding. ``engine``: the training engine of
    such a model, where it was loaded to be trained.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    world: World | None = None
    lockstep: bool = False
    engine: Any = None

    def shared_out(self, batches: list[_T], do: Callable[[_T], R], advance: Callable[[_T], None]) -> list[R]:
        """Run ``do`` on every batch, shared out between the processes; all results, in order, on every process.

        In lockstep a process for which the last round leaves no batch does one again, and one that has diverged goes
        on: ``do`` must make the same number of forward passes for every batch.

        Raises:
            Diverged: ``do`` raised it, on any process.
        """
        rank, size = (self.world.rank, self.world.size) if self.world is not None else (0, 1)
        mine: list[R] = []
        diverged = False
        for first in range(0, len(batches), size):
            number = first + rank
            if number >= len(batches) and not self.lockstep:
                break
            try:
                result = do(batches[min(number, len(batches) - 1)])
            except Diverged:
                diverged = True
                if not self.lockstep:
                    break
                continue
            if number < len(batches):
                mine.append(result)
                advance(batches[number])
        parts = [(diverged, mine)] if self.world is None or size == 1 else self.world.gather((diverged, mine))
        if any(failed for failed, _ in parts):
            raise Diverged
        for number, batch in enumerate(batches):
            if number % size != rank:
                advance(batch)
        return [parts[number % size][1][number // size] for number in range(len(batches))]

    def in_order(
        self, batches: list[list[int]], do: Callable[[list[int]], list[R]], advance: Advance | None = None
    ) -> list[R]:
        """Run ``do`` on every batch of indices by :meth:`shared_out`; results in the order of the indices."""
        results = self.shared_out(batches, do, lambda batch: advance(len(batch)) if advance is not None else None)
        indices = [index for batch in batches for index in batch]
        by_index = dict(zip(indices, [one for part in results for one in part], strict=True))
        return [by_index[index] for index in range(len(by_index))]

    @classmethod
    def of_engine(
        cls, engine: Any, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, world: World, sharding: Sharding
    ) -> LanguageModel:
        """The model in a DeepSpeed engine, as it stands."""
        from transformers import GenerationConfig

        engine.module.generation_config = GenerationConfig()
        lockstep = world.size > 1 and not sharding.whole
        return cls(engine.module, tokenizer, settings, world, lockstep=lockstep)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_id(self) -> int:
        from trace_ds.corpora.tokenizer import pad_token_id

        return pad_token_id(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with BOS where the run puts one before its documents."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self.settings.add_bos and bos is not None else list(ids)

    def encode_document(self, text: str) -> list[int]:
        """:meth:`encode`, with EOS where the run puts one after its documents."""
        ids = self.encode(text)
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if self.settings.add_eos and eos is not None else ids

    def decode(self, texts: list[list[int]]) -> list[str]:
        """Token ids as text, without special tokens."""
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]

    def encode_completion(self, prompt: str, completion: str, where: str) -> Sequence:
        """``prompt + completion`` as tokens; scored are those after the longest start shared with the prompt alone (a
        token that spans the boundary is not known from the prompt)."""
        ids = self.encode(prompt + completion)
        first = shared_start(ids, self.encode(prompt))
        self.check_length(len(ids), where)
        return Sequence(tuple(ids), max(1, min(first, len(ids) - 1)))

    def most_tokens(self, context_length: int) -> int:
        """Most tokens of one pass: the run's context, or the model's limit where that is less."""
        return min(context_length, getattr(self.model.config, "max_position_embeddings", None) or context_length)

    def check_length(self, tokens: int, where: str) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise UserError(f"the item needs {tokens} tokens and the model reads {limit}", where, "shorten the item")

    @torch.no_grad()
    def score(self, sequences: list[Sequence], advance: Advance | None = None) -> list[TokenScores]:
        """Score the tokens of every sequence; ``advance`` counts sequences.

        Raises:
            Diverged: a log-probability is not finite.
        """
        groups = sharing(sequences)
        rows = [Sequence(sequences[group[0]].ids, min(sequences[i].first for i in group)) for group in groups]
        batches = [
            [index for row in batch for index in groups[row]]
            for batch in plan_batches(rows, self.settings.batch_rows, self.model.config.vocab_size)
        ]
        return self.in_order(batches, lambda batch: self._score_batch([sequences[i] for i in batch]), advance)

    def _score_batch(self, sequences: list[Sequence]) -> list[TokenScores]:
        """Of sequences that stand behind the one whose row they share (:func:`sharing`)."""
        rows: list[Sequence] = []
        row_of = []
        for sequence in sequences:
            context = sequence.ids[:-1]
            if not rows or rows[-1].ids[:-1][: len(context)] != context:
                rows.append(sequence)
            row_of.append(len(rows) - 1)
        length = max(len(row.ids) for row in rows) - 1  # nothing is predicted from the last token
        ids_BS = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids_BS[number, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
        start = min(sequence.first for sequence in sequences) - 1  # the logits at position t predict token t + 1
        output = self.model(
            input_ids=to_device(ids_BS, self.device),
            logits_to_keep=length - start,
            **packed(self.model, torch.arange(length).expand(len(rows), -1), self.device),
        )
        logits_BSV = output.logits
        sizes = [len(sequence.ids) - sequence.first for sequence in sequences]
        row_N = [row for row, size in zip(row_of, sizes, strict=True) for _ in range(size)]
        token_N = [t for sequence in sequences for t in range(sequence.first, len(sequence.ids))]
        # which[N]: of the places, each a row and a token that is predicted (from 1 on: "length" itself is one)
        place_P, which = np.unique(np.array(row_N) * (length + 1) + token_N, return_inverse=True)
        device = logits_BSV.device
        row_P, token_P, which_N = (
            to_device(torch.from_numpy(array), device) for array in (*np.divmod(place_P, length + 1), which)
        )
        target_N = to_device(torch.tensor([t for s in sequences for t in s.ids[s.first :]]), device)
        logits_PV = logits_BSV[row_P, token_P - 1 - start].float()
        log_normaliser_P = torch.logsumexp(logits_PV, -1)
        log_prob_N = logits_PV[which_N, target_N] - log_normaliser_P[which_N]
        columns = [log_prob_N, (logits_PV.argmax(-1)[which_N] == target_N).float()]
        log_prob, is_argmax = torch.stack(columns).cpu().numpy()  # the one wait for the device
        if not np.isfinite(log_prob).all():
            raise Diverged
        cuts = np.cumsum(sizes)[:-1]
        arrays = [np.split(column, cuts) for column in (log_prob, is_argmax.astype(bool))]
        return [TokenScores(*values) for values in zip(*arrays, strict=True)]

    @torch.no_grad()
    def continue_greedily(
        self, prompts: list[list[int]], lengths: list[int], advance: Advance | None = None
    ) -> list[list[int]]:
        """Greedy continuations of at most ``lengths`` tokens, cut at EOS (not included); ``advance`` counts prompts.

        Raises:
            Diverged: a log-probability of a prompt is not finite (generation itself would go on with nonsense).
        """
        self.score([Sequence(tuple(ids), len(ids) - 1) for ids in prompts if len(ids) > 1])
        # a batch generates as many tokens as its longest continuation may have, so like goes with like
        order = sorted(range(len(prompts)), key=lambda index: (-lengths[index], -len(prompts[index]), index))
        size = self.settings.batch_rows
        batches = [order[begin : begin + size] for begin in range(0, len(order), size)]

        return self.in_order(
            batches,
            lambda batch: self._continue_batch([prompts[i] for i in batch], [lengths[i] for i in batch]),
            advance,
        )

    def _continue_batch(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        from transformers import GenerationConfig

        eos = self.tokenizer.eos_token_id
        longest = max(len(ids) for ids in prompts)
        ids_BS = torch.full((len(prompts), longest), self.pad_id, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for number, ids in enumerate(prompts):  # filled at the left: all continuations begin at the same place
            ids_BS[number, longest - len(ids) :] = torch.tensor(ids)
            mask_BS[number, longest - len(ids) :] = 1
        output_BS = self.model.generate(
            input_ids=to_device(ids_BS, self.device),
            attention_mask=to_device(mask_BS, self.device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max(lengths), eos_token_id=eos, pad_token_id=self.pad_id
            ),
            synced_gpus=self.lockstep,
        )
        new = [row[:length] for row, length in zip(output_BS[:, longest:].tolist(), lengths, strict=True)]
        return [row[: row.index(eos)] if eos in row else row for row in new]


def shared_start(ids: list[int], others: list[int]) -> int:
    """How many tokens both begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(ids), len(others)))


def sharing(sequences: list[Sequence]) -> list[list[int]]:
    """Indices of ``sequences`` in groups that one row serves, that of the first: what the others' last tokens are
    predicted from begins it. Choices of one token after the same question are one row, not four."""
    order = sorted(range(len(sequences)), key=lambda index: (sequences[index].ids[:-1], index), reverse=True)
    groups: list[list[int]] = []
    for index in order:  # what begins like a row stands behind it, before all rows that begin otherwise
        context = sequences[index].ids[:-1]
        if groups and sequences[groups[-1][0]].ids[: len(context)] == context:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def plan_batches(sequences: list[Sequence], batch_rows: int, vocabulary: int) -> list[list[int]]:
    """Indices of ``sequences`` in batches: of similar length, longest first, at most ``batch_rows``, bounded tokens and
    logits; pure."""
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index].ids), index))
    batches: list[list[int]] = []
    length = first = 0
    for index in order:
        sequence = sequences[index]
        if batches:
            rows = len(batches[-1]) + 1
            kept = length - min(first, sequence.first) + 1
            fits = rows <= batch_rows and rows * length <= TOKENS_PER_FORWARD
            if fits and rows * kept * vocabulary <= LOGITS_PER_FORWARD:
                batches[-1].append(index)
                first = min(first, sequence.first)
                continue
        batches.append([index])
        length, first = len(sequence.ids), sequence.first
    return batches


@contextlib.contextmanager
def loaded(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelSettings,
    world: World | None = None,
    sharding: Sharding = Sharding(),
    trained: TrainingConfig | None = None,
) -> Iterator[LanguageModel]:
    """Load a local model directory for inference and free it afterwards; never runs code that ships with it.

    Whole: on the GPU if there is one.
    Sharded over the ranks of ``world`` (collective): a DeepSpeed engine, each reading its share, and where it is to be
    ``trained`` with an optimizer. UserError: the directory is damaged.
    """
    from transformers import GenerationConfig

    engine = None
    if world is not None and world.size > 1 and not sharding.whole:
        engine = _load_engine(path, settings, world, sharding, trained)
        model = engine.module
    else:
        model = _load_whole(path, settings)
    try:
        if model.config.vocab_size < len(tokenizer):
            problem = f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}"
            raise UserError(problem, path, "give the model the run's tokenizer")
        model.generation_config = GenerationConfig()  # the directory's may sample or penalise repetition
        trainable = engine if trained is not None else None
        yield LanguageModel(model, tokenizer, settings, world, lockstep=engine is not None, engine=trainable)
    finally:
        if engine is not None:
            engine.destroy()
        del model, engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load_engine(
    path: str, settings: ModelSettings, world: World, sharding: Sharding, trained: TrainingConfig | None
) -> Any:
    from trace_ds.models.engine import inference_engine
    from trace_ds.models.families import check_expert_parallel, inspect_model
    from trace_ds.unlearning.trainer import training_engine

    info = world.run_on_main_and_broadcast(lambda: inspect_model(path))
    check_expert_parallel(info, sharding.ep, world.size, "evaluation.ep")
    shape: dict[str, Any] = {"dtype": settings.dtype, "ep": sharding.ep}
    if trained is None:
        return inference_engine(info, world, **shape, zero_stage=sharding.zero_stage)
    engine = training_engine(trained, info, world, 1, **shape)
    engine.eval()
    return engine


def _load_whole(path: str, settings: ModelSettings) -> Any:
    from trace_ds.models.engine import TORCH_DTYPES
    from trace_ds.models.loading import load_whole

    dtype = TORCH_DTYPES[settings.dtype]
    return load_whole(Path(path), dtype, _device_for(path, dtype))


def _device_for(path: str, dtype: torch.dtype) -> torch.device:
    """The CPU, or this process's GPU; UserError: the weights need more than 80 % of it."""
    from trace_ds.tensors.model_files import read_model_directory

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if read_model_directory(path).parameters * dtype.itemsize > 0.8 * free_bytes:
        fix = "share it among several processes (--nproc) by evaluation.ep, or by evaluation.zero_stage: 3"
        raise UserError("the model does not fit into one GPU", path, fix)
    return device
