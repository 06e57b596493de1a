"""YAML as plain data of bounded size: what a configuration, a ``--set`` value and a resolved file are written in."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

MAX_CONFIG_CHARACTERS = 1 << 18
MAX_DEPTH = 40
MAX_VALUES = 20_000
SHOWN_CHARACTERS = 60
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML of plain data: no dates (2024-01-01 is a text), sets or bytes; 1e-5 is a number (YAML 1.1: a text)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )

for _kind in ("timestamp", "binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"{TAG}{_kind}", _Loader.construct_undefined)  # type: ignore[type-var]


def parse_yaml(text: str) -> Any:
    """The plain data of a YAML text of bounded size; ValueError says what is wrong with it, and in which line.

    A key that is there twice or is no text is an error. Depth and the number of values, each alias counted as all that
    it stands for, are checked before anything is made of them.
    """
    if len(text) > MAX_CONFIG_CHARACTERS:
        raise ValueError(
            f"it has {len(text):,} characters, more than the {MAX_CONFIG_CHARACTERS:,} of any configuration"
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _measure(node, {})
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "syntax"
        raise ValueError(f"not valid YAML{line} ({problem})") from None
    except RecursionError:
        raise ValueError(f"not valid YAML (nested more than {MAX_DEPTH} deep)") from None
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:  # a scalar: 0x_, !!int abc
        raise ValueError(f"not valid YAML ({str(error)[:SHOWN_CHARACTERS]})") from None


def _measure(node: yaml.Node | None, sizes: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, depth) of what a node stands for; ``known`` holds those measured so far (None: we are inside it)."""

    def refuse(problem: str, at: yaml.Node) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, at.start_mark)

    if not isinstance(node, yaml.CollectionNode):
        return 1, 0
    if id(node) in sizes:
        return sizes[id(node)] or refuse("an alias refers to what it is in", node)
    sizes[id(node)] = None
    values, depth, seen = 1, 0, set()
    for item in node.value:
        value = item
        if isinstance(node, yaml.MappingNode):
            key, value = item
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{TAG}str", f"{TAG}merge", f"{TAG}value"):
                shown = key.value[:SHOWN_CHARACTERS] if isinstance(key, yaml.ScalarNode) else "a list or a section"
                refuse(f"the key {shown!r} is no text: quote it", key)
            if key.value in seen:
                refuse(f"{key.value!r} is there twice", key)
            seen.add(key.value)
        more, deep = _measure(value, sizes)
        values, depth = values + more, max(depth, deep + 1)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            limit = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            refuse(limit, node)
    sizes[id(node)] = values, depth
    return values, depth


def dump_text(value: Any) -> str:
    """``value`` as YAML in its own order, which :func:`parse_yaml` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
