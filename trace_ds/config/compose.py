"""Recipes and how they compose: YAML files laid one over another, before anything is checked against the schema.

    compose(["wmdp_cyber", "olmoe_1b_7b", "mine.yaml"]).raw

A recipe that comes with the package is a whole run (``recipes/*.yaml``) or a fragment of one: a model
(``recipes/models/``) or a task (``recipes/tasks/``). Its name stands wherever the path of a file does. Several files
are merged from left to right; a file's own ``extends: NAME | PATH | [...]`` is what it is laid over, a relative path
being relative to the file. A model and a task may be named in either order: the task is laid over the model, whose
strengths are RMU's and give way where the task has another loss.

Merging: sections are merged key by key, everything else (lists too) is replaced, the later one wins.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trace_ds.config.sections.base import expanded
from trace_ds.errors import UserError, listed

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GROUPS = {"run": RECIPES, "model": RECIPES / "models", "task": RECIPES / "tasks"}
EXTENDS = "extends"
MAX_FILES = 100  # read for one configuration, one that is extended twice counted twice
MAX_CONFIG_CHARACTERS = 1 << 18


class _Loader(yaml.SafeLoader):
    """YAML of plain data: no aliases, no dates (2024-01-01 is a text), keys once; 1e-5 is a number (YAML 1.1: text)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few of them stand for gigabytes
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            is_text = isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str"
            if not is_text or key.value in seen:
                problem = "a key is there twice" if is_text else "a key is no text: quote it"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would read as a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )

for _kind in ("timestamp", "binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_undefined)  # type: ignore[type-var]


def parse_yaml(text: str) -> Any:
    """The plain data of a YAML text of bounded size; ValueError says what is wrong with it, and in which line."""
    if len(text) > MAX_CONFIG_CHARACTERS:
        raise ValueError(f"not valid YAML (it has more than {MAX_CONFIG_CHARACTERS:,} characters)")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "syntax"
        raise ValueError(f"not valid YAML{line} ({problem})") from None
    except RecursionError:
        raise ValueError("not valid YAML (nested too deep)") from None
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:  # a scalar: 0x_, !!int abc
        raise ValueError(f"not valid YAML ({str(error)[:60]})") from None


def dump_text(value: Any) -> str:
    """``value`` as YAML in its own order, which :func:`parse_yaml` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass
class Composed:
    """Configuration files and recipes, merged into one mapping.

    Attributes:
        raw: the merged keys, without ``extends``; nothing in it belongs to another configuration.
        where: the files and recipes named, for messages.
        folder: of the last file named ("." for a recipe).
        fragments: the model's and the task's name, where there is one.
    """

    raw: dict[str, Any]
    where: str
    folder: str
    fragments: dict[str, str]

    @property
    def name(self) -> str | None:
        """Default name of a run that is composed of a task and a model: TASK-MODEL."""
        return "-".join(self.fragments[kind] for kind in ("task", "model") if kind in self.fragments) or None


def recipe_names(kind: str) -> list[str]:
    """Names of the recipes of a kind (run, model or task) that come with the package, sorted."""
    return sorted(path.stem for path in GROUPS[kind].glob("*.yaml"))


def recipes() -> dict[str, Path]:
    """Every recipe's file by its name, whatever its kind."""
    return {name: GROUPS[kind] / f"{name}.yaml" for kind in GROUPS for name in recipe_names(kind)}


def _kind_of(path: Path) -> str:
    """run, model or task for a recipe of the package; "" for any other file."""
    return next((kind for kind, folder in GROUPS.items() if path.resolve().parent == folder), "")


def find_config(config: str, folder: Path = Path()) -> Path:
    """The file that a name or a path stands for; a file goes before a recipe of its name.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    beside: list[str] = []
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        if (path := folder / expanded(config)).is_file():
            return path
        beside = sorted(str(Path(config).with_name(item.name)) for item in path.parent.glob("*.y*ml"))
    files = recipes()
    if config in files:
        return files[config]
    close = difflib.get_close_matches(config, [*files, *beside], 3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    hint += f"its folder has {listed(Path(name).name for name in beside)}; " if beside and is_config(config) else ""
    raise UserError("no such configuration file or recipe", config, f"{hint}`trace-ds recipes` lists the recipes")


def is_config(config: str) -> bool:
    """Whether a word of the command line stands for a configuration (and not for a checkpoint or a model)."""
    return config.endswith((".yaml", ".yml")) or config in recipes()


def read_config_text(path: Path) -> str:
    """The text of a configuration file, one character longer than :func:`parse_yaml` accepts at most."""
    try:
        with path.open(encoding="utf-8-sig") as handle:
            return handle.read(MAX_CONFIG_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start})", shown(path), "save the file as UTF-8") from None


def shown(path: Path) -> str:
    """A file as messages name it."""
    kind = _kind_of(path)
    return f"{'recipe' if kind == 'run' else kind} {path.stem}" if kind else str(path)


def merge(under: Any, over: Any) -> Any:
    """``over`` laid over ``under``: sections key by key, everything else replaced; both stay as they are."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    return copy.deepcopy(under) | {key: merge(under.get(key), value) for key, value in over.items()}


@dataclass
class _Reading:
    """One composition under way: the fragments met so far and the number of files read."""

    fragments: dict[str, str] = field(default_factory=dict)
    files: int = 0

    def read(self, path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
        """The keys of a file, laid over what it extends; ``inside``: the files that led to it."""
        self.files += 1
        resolved = path.resolve()
        if resolved in inside or self.files > MAX_FILES:
            circle = " → ".join(shown(each) for each in (*inside, resolved)) if resolved in inside else "too many files"
            raise UserError(f"extends refers back to itself ({circle})", shown(path), "take one extends out")
        if (kind := _kind_of(path)) in ("model", "task"):
            first = self.fragments.setdefault(kind, path.stem)
            if first != path.stem:
                raise UserError(f"a run has one {kind}, and two are named", f"{first} and {path.stem}", "leave one out")
        raw = parse_file(path)
        bases = raw.pop(EXTENDS, [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
            raise UserError("extends is no name or path, or list of them", shown(path), "write extends: NAME")
        bases = [find_config(base, path.parent) for base in bases]
        return dict(merge(self.layers(bases, (*inside, resolved)), raw))

    def layers(self, paths: Sequence[Path], inside: tuple[Path, ...]) -> dict[str, Any]:
        """Files merged in their order, a task over a model."""
        merged: dict[str, Any] = {}
        for path in _in_order(paths):
            merged = merge(merged, self.read(path, inside))
        return merged


def _in_order(paths: Sequence[Path]) -> list[Path]:
    """The same with a model where the first of the fragments stood and the task where the second did.

    Raises:
        UserError: a recipe that is a whole run is named beside a fragment.
    """
    kinds = [_kind_of(path) for path in paths]
    places = [place for place, kind in enumerate(kinds) if kind in ("model", "task")]
    if places and "run" in kinds:
        name = paths[kinds.index("run")].stem
        raise UserError(
            "this recipe is a whole run, neither a model nor a task",
            name,
            f"name it alone, or choose among {_names('model')} and {_names('task')}",
        )
    ordered = list(paths)
    for place, path in zip(places, sorted((paths[place] for place in places), key=_kind_of), strict=True):
        ordered[place] = path
    return ordered


def parse_file(path: Path) -> dict[str, Any]:
    """The keys of one file, nothing shared, ``${config_dir}`` replaced by its folder ("." for a recipe).

    Raises:
        UserError: it cannot be read, is not valid YAML or holds no keys.
    """
    try:
        raw = parse_yaml(read_config_text(path))
    except ValueError as error:
        raise UserError(str(error), shown(path), "correct the file") from None
    if not isinstance(raw, dict):
        raise UserError("the file holds no keys", shown(path), "start from a recipe: `trace-ds recipes --show NAME`")
    return dict(substitute(raw, {"config_dir": _folder(path)}))


def compose(configs: Iterable[str]) -> Composed:
    """Read files and recipes, with all that they extend, and merge them.

    Raises:
        UserError: one is not there or cannot be read; a circle; two models, two tasks; a whole run beside a fragment.
    """
    paths = [find_config(config) for config in configs]
    reading = _Reading()
    raw = reading.layers(paths, ())
    return Composed(raw, " + ".join(map(shown, paths)), _folder(paths[-1]), reading.fragments)


def require_whole(composed: Composed, raw: dict[str, Any]) -> None:
    """Refuse a task without a model, or a model without corpora; the UserError says what to add."""
    if "task" in composed.fragments and not raw.get("model"):
        raise UserError(
            "the key model.path is missing: a task is half a run",
            composed.where,
            f"name a model too ({_names('model')}), or --set model.path=DIRECTORY",
        )
    if "model" in composed.fragments and not raw.get("data"):
        raise UserError(
            "the keys data.forget and data.retain are missing: a model is half a run",
            composed.where,
            f"name a task too ({_names('task')}), or a file with your own data",
        )


def _names(kind: str) -> str:
    return ", ".join(recipe_names(kind))


def _folder(path: Path) -> str:
    return "." if _kind_of(path) else str(path.parent)


def substitute(value: Any, values: dict[str, str]) -> Any:
    """A copy with ``${NAME}`` replaced in every text."""
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace("${" + name + "}", text)
        return value
    if isinstance(value, dict):
        return {key: substitute(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, values) for item in value]
    return value


# What a model's shapes are before it is downloaded: the config.json that was published of each model fragment.


def published_config_path(fragment: str) -> Path:
    """Path of the ``config.json`` that the hub has of a model fragment, kept beside it."""
    return GROUPS["model"] / "configs" / f"{fragment}.json"


def published_config(fragment: str) -> dict[str, Any]:
    """The values of the hub's file that say how large the model is and how it computes (no token ids)."""
    return dict(json.loads(published_config_path(fragment).read_text(encoding="utf-8")))


def fragment_of(model_path: str) -> str | None:
    """The model fragment whose ``model.path`` is this hub id (with or without ``@REVISION``), if there is one."""
    hub_id = model_path.partition("@")[0]
    for name in recipe_names("model"):
        if parse_file(GROUPS["model"] / f"{name}.yaml")["model"]["path"] == hub_id:
            return name
    return None
