"""The model wrapper that metrics use: load a Hugging Face model, score given tokens, continue greedily.

    with open_language_model(path, tokenizer, settings) as model:
        scores = model.score([Sequence((1, 5, 9, 2), first=2)])

To score, sequences that begin alike are batched, and the tokens that they share at their beginning are computed once (a
few-shot prompt, or a question before its answers). A model with transformers' own attention gets batches of similar
length instead, padded on the right, without a mask: attention is causal and experts drop no token, so padding cannot
influence a real token. In fp32 the scores equal those of one by one to 1e-5; in bf16 another batch size changes the
last digits of a matrix product, and with them close decisions. To generate, prompts are padded on the left, with a
mask. Log-probabilities are float32 for any dtype of the model. The order of the batches depends only on the input, so a
rerun on the same machine gives the same bits.

Shape legend: B rows of a batch, S positions, V vocabulary, N scored tokens of a batch, P positions that predict them.
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
from trace_ds.models.attention import common_prefix_length, is_adopted, packed, shared_prefixes
from trace_ds.parallel.device import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trace_ds.config.sections.training import TrainingConfig
    from trace_ds.parallel.world import World

LOGITS_PER_FORWARD = 1 << 28  # one GiB of float32 logits
TOKENS_PER_FORWARD = 1 << 16
LogitsOf = Callable[[np.ndarray], torch.Tensor]  # places in the input, int64 [P] → logits there, [P, V]
OnProgress = Callable[[int], None]  # receives the number of newly finished items
_T = TypeVar("_T")
R = TypeVar("R")


class Diverged(ArithmeticError):
    """The model's log-probabilities are not finite, so it has no scores."""


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
    """``ep`` ranks share a model's experts; at ``zero_stage`` 3 all ranks share all weights."""

    ep: int = 1
    zero_stage: int = 0

    @property
    def whole(self) -> bool:
        """Every rank holds the whole model."""
        return self.ep == 1 and self.zero_stage == 0


@dataclass(eq=False)
class LanguageModel:
    """A causal language model with the tokenizer of the run; created by :func:`open_language_model`.

    With a ``world`` of several ranks, each takes every ``world.size``-th *batch*; all ranks call the same methods and
    get all results. The batches are those of a single process. If each rank holds the whole model so are the numbers,
    bit for bit on the same kind of device; if it is sharded, up to rounding.

    Attributes:
        lockstep: the model is sharded. Its ranks exchange tokens or weights in every layer, so each forward pass must
            be made by all of them.
        engine: the training engine of a sharded model that was loaded to be trained.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    world: World | None = None
    lockstep: bool = False
    engine: Any = None

    def map_batches(self, batches: list[_T], fn: Callable[[_T], R], on_batch: Callable[[_T], None]) -> list[R]:
        """Run ``fn`` on every batch, each on one rank, and return all results, in order, on every rank.

        In lockstep, a rank without a batch in the last round repeats the last batch and discards the result, and a rank
        that has diverged continues: ``fn`` must make the same number of forward passes for every batch.

        Args:
            on_batch: called on every rank for each finished batch.

        Raises:
            Diverged: ``fn`` raised it, on any rank.
        """
        rank, size = (self.world.rank, self.world.size) if self.world is not None else (0, 1)
        local: list[R] = []
        diverged = False
        for first in range(0, len(batches), size):
            number = first + rank
            if number >= len(batches) and not self.lockstep:
                break
            try:
                result = fn(batches[min(number, len(batches) - 1)])
            except Diverged:
                diverged = True
                if not self.lockstep:
                    break
                continue
            if number < len(batches):
                local.append(result)
                on_batch(batches[number])
        gathered = [(diverged, local)] if self.world is None or size == 1 else self.world.gather((diverged, local))
        if any(failed for failed, _ in gathered):
            raise Diverged
        for number, batch in enumerate(batches):
            if number % size != rank:
                on_batch(batch)
        return [gathered[number % size][1][number // size] for number in range(len(batches))]

    def map_indices(
        self, batches: list[list[int]], fn: Callable[[list[int]], list[R]], progress: OnProgress | None = None
    ) -> list[R]:
        """Run ``fn`` on every batch of indices with :meth:`map_batches`; return results in the order of the indices."""
        results = self.map_batches(batches, fn, lambda batch: progress(len(batch)) if progress is not None else None)
        indices = [index for batch in batches for index in batch]
        by_index = dict(zip(indices, [result for batch in results for result in batch], strict=True))
        return [by_index[index] for index in range(len(by_index))]

    @classmethod
    def of_engine(
        cls, engine: Any, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, world: World, sharding: Sharding
    ) -> LanguageModel:
        """Wrap the current model of a DeepSpeed engine."""
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
        """Return the token ids of a text, with BOS if the run's documents begin with one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self.settings.add_bos and bos is not None else list(ids)

    def encode_document(self, text: str) -> list[int]:
        """Like :meth:`encode`, with EOS if the run's documents end with one."""
        ids = self.encode(text)
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if self.settings.add_eos and eos is not None else ids

    def decode(self, texts: list[list[int]]) -> list[str]:
        """Return token ids as texts, without special tokens."""
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]

    def encode_completion(self, prompt: str, completion: str, where: str) -> Sequence:
        """Tokenise ``prompt + completion`` to score the tokens after the longest common prefix with the prompt's own.

        A token that spans the boundary is thus scored.
        """
        ids = self.encode(prompt + completion)
        first = common_prefix_length(ids, self.encode(prompt))
        self.check_length(len(ids), where)
        return Sequence(tuple(ids), max(1, min(first, len(ids) - 1)))

    def max_tokens(self, context_length: int) -> int:
        """Return the largest number of tokens in a row: ``context_length``, or the model's limit if that is less."""
        return min(context_length, getattr(self.model.config, "max_position_embeddings", None) or context_length)

    def check_length(self, tokens: int, where: str) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise UserError(f"the item needs {tokens} tokens and the model reads {limit}", where, "shorten the item")

    @torch.no_grad()
    def score(self, sequences: list[Sequence], progress: OnProgress | None = None) -> list[TokenScores]:
        """Score the tokens of every sequence; ``progress`` counts sequences.

        Raises:
            Diverged: a log-probability is not finite.
        """
        groups = group_by_prefix(sequences)
        rows = [Sequence(sequences[group[0]].ids, min(sequences[i].first for i in group)) for group in groups]
        batches = [
            [index for row in batch for index in groups[row]]
            for batch in plan_batches(
                rows, self.settings.batch_rows, self.model.config.vocab_size, by_length=not is_adopted(self.model)
            )
        ]
        return self.map_indices(batches, lambda batch: self._score_batch([sequences[i] for i in batch]), progress)

    def _score_batch(self, sequences: list[Sequence]) -> list[TokenScores]:
        """Score one batch, ordered as :func:`group_by_prefix` does: those that share a row follow its owner."""
        rows: list[Sequence] = []
        row_of = []
        for sequence in sequences:
            context = sequence.ids[:-1]
            if not rows or rows[-1].ids[:-1][: len(context)] != context:
                rows.append(sequence)
            row_of.append(len(rows) - 1)
        contexts = [row.ids[:-1] for row in rows]  # nothing is predicted from the last token
        logits_of, places = self._shared(contexts) if is_adopted(self.model) else self._padded(contexts)
        sizes = [len(sequence.ids) - sequence.first for sequence in sequences]
        # Sequences that share a row may score the same token of it: P distinct places in the input, whose logits
        # predict the next token; which_N is that of each scored token.
        pairs = zip(row_of, sequences, strict=True)
        place_N = np.concatenate([places[row][sequence.first - 1 : len(sequence.ids) - 1] for row, sequence in pairs])
        place_P, which = np.unique(place_N, return_inverse=True)
        logits_PV = logits_of(place_P).float()
        device = logits_PV.device
        which_N = to_device(torch.from_numpy(which), device)
        target_N = to_device(torch.tensor([t for s in sequences for t in s.ids[s.first :]]), device)
        log_normaliser_P = torch.logsumexp(logits_PV, -1)
        log_prob_N = logits_PV[which_N, target_N] - log_normaliser_P[which_N]
        columns = [log_prob_N, (logits_PV.argmax(-1)[which_N] == target_N).float()]
        log_prob, is_argmax = torch.stack(columns).cpu().numpy()  # the only synchronisation with the device
        if not np.isfinite(log_prob).all():
            raise Diverged
        cuts = np.cumsum(sizes)[:-1]
        arrays = [np.split(column, cuts) for column in (log_prob, is_argmax.astype(bool))]
        return [TokenScores(*values) for values in zip(*arrays, strict=True)]

    def _shared(self, contexts: list[tuple[int, ...]]) -> tuple[LogitsOf, list[np.ndarray]]:
        inputs, places = shared_prefixes(contexts, self.device)

        def logits_of(place_P: np.ndarray) -> torch.Tensor:
            kept = to_device(torch.from_numpy(place_P), self.device)
            return self.model(**inputs, logits_to_keep=kept).logits[0]

        return logits_of, places

    def _padded(self, contexts: list[tuple[int, ...]]) -> tuple[LogitsOf, list[np.ndarray]]:
        length = max(map(len, contexts))
        ids_BS = torch.full((len(contexts), length), self.pad_id, dtype=torch.int64)
        for number, context in enumerate(contexts):
            ids_BS[number, : len(context)] = torch.tensor(context)
        positions = packed(self.model, torch.arange(length).expand(len(contexts), -1), self.device)

        def logits_of(place_P: np.ndarray) -> torch.Tensor:
            row_P, position_P = np.divmod(place_P, length)
            start = int(position_P.min())
            ids = to_device(ids_BS, self.device)
            logits_BSV = self.model(input_ids=ids, logits_to_keep=length - start, **positions).logits
            index = (to_device(torch.from_numpy(a), logits_BSV.device) for a in (row_P, position_P - start))
            return logits_BSV[tuple(index)]

        return logits_of, [number * length + np.arange(len(context)) for number, context in enumerate(contexts)]

    @torch.no_grad()
    def continue_greedily(
        self, prompts: list[list[int]], lengths: list[int], progress: OnProgress | None = None
    ) -> list[list[int]]:
        """Return greedy continuations of at most ``lengths`` tokens, cut before EOS; ``progress`` counts prompts.

        Raises:
            Diverged: a log-probability of a prompt is not finite (generation itself would not notice).
        """
        self.score([Sequence(tuple(ids), len(ids) - 1) for ids in prompts if len(ids) > 1])
        # a batch generates as many tokens as its longest continuation may have: batch similar lengths
        order = sorted(range(len(prompts)), key=lambda index: (-lengths[index], -len(prompts[index]), index))
        size = self.settings.batch_rows
        batches = [order[begin : begin + size] for begin in range(0, len(order), size)]

        return self.map_indices(
            batches,
            lambda batch: self._continue_batch([prompts[i] for i in batch], [lengths[i] for i in batch]),
            progress,
        )

    def _continue_batch(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        from transformers import GenerationConfig

        eos = self.tokenizer.eos_token_id
        longest = max(len(ids) for ids in prompts)
        ids_BS = torch.full((len(prompts), longest), self.pad_id, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for number, ids in enumerate(prompts):  # padded on the left: all continuations begin at the same position
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


def group_by_prefix(sequences: list[Sequence]) -> list[list[int]]:
    """Group the indices of sequences that one row of a batch can score: that of the group's first.

    The context of the others (all but the last token) is a prefix of the first, so four choices of one token after the
    same question need one row.
    """
    order = sorted(range(len(sequences)), key=lambda index: (sequences[index].ids[:-1], index), reverse=True)
    groups: list[list[int]] = []
    for index in order:  # in reverse lexicographic order, prefixes directly follow the sequence that they begin
        context = sequences[index].ids[:-1]
        if groups and sequences[groups[-1][0]].ids[: len(context)] == context:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def plan_batches(sequences: list[Sequence], batch_rows: int, vocabulary: int, *, by_length: bool) -> list[list[int]]:
    """Split the indices of ``sequences`` into batches, in their order or (``by_length``) longest first.

    Each has at most ``batch_rows`` rows and, filled up to its longest, :data:`TOKENS_PER_FORWARD` tokens and
    :data:`LOGITS_PER_FORWARD` logits.
    """
    order = list(range(len(sequences)))
    if by_length:
        order.sort(key=lambda index: -len(sequences[index].ids))
    batches: list[list[int]] = []
    length = first = 0
    for index in order:
        sequence = sequences[index]
        longest, earliest = max(length, len(sequence.ids)), min(first, sequence.first)
        rows = len(batches[-1]) + 1 if batches else 1
        fits = rows <= batch_rows and rows * longest <= TOKENS_PER_FORWARD
        if batches and fits and rows * (longest - earliest + 1) * vocabulary <= LOGITS_PER_FORWARD:
            batches[-1].append(index)
            length, first = longest, earliest
        else:
            batches.append([index])
            length, first = len(sequence.ids), sequence.first
    return batches


@contextlib.contextmanager
def open_language_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: ModelSettings,
    world: World | None = None,
    sharding: Sharding = Sharding(),
    trained: TrainingConfig | None = None,
) -> Iterator[LanguageModel]:
    """Load a local model directory, and free it afterwards; never runs code that ships with the model.

    A whole model is loaded on the GPU if there is one. A sharded one (collective over ``world``) is a DeepSpeed engine,
    of which each rank reads its share, with an optimizer if ``trained`` is given.

    Raises:
        UserError: the directory is damaged, the vocabularies do not fit, or the GPU's memory is too small.
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
    """Return the CPU, or this process's GPU; UserError if the weights need more than 80 % of its free memory."""
    from trace_ds.tensors.model_files import read_model_directory

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if read_model_directory(path).parameters * dtype.itemsize > 0.8 * free_bytes:
        fix = "share it among several processes (--nproc) by evaluation.ep, or by evaluation.zero_stage: 3"
        raise UserError("the model does not fit into one GPU", path, fix)
    return device
