"""From a YAML file (or the name of a shipped recipe) and ``--set`` overrides to a checked :class:`Config`."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from trace_ds.config.schema import Config, expanded
from trace_ds.errors import UserError

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 40
MAX_VALUES = 20_000
SHOWN_CHARACTERS = 60
LOSS_KEY = "unlearning.forget_loss"
# Sections of one forget loss each. That of rmu is none: its layer is also that of hidden_mse, and recipes give it a
# coefficient and leave the loss to --set, to variants and to studies.
LOSS_SECTIONS = ("npo", "simnpo", "dpo", "wga", "satimp", "undial", "pdu")
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
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, more than the {MAX_CHARACTERS:,} of any configuration")
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


def _measure(node: yaml.Node | None, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, depth) of what a node stands for; ``known`` holds those measured so far (None: we are inside it)."""

    def refuse(problem: str, at: yaml.Node) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, at.start_mark)

    if not isinstance(node, yaml.CollectionNode):
        return 1, 0
    if id(node) in known:
        return known[id(node)] or refuse("an alias refers to what it is in", node)
    known[id(node)] = None
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
        more, deep = _measure(value, known)
        values, depth = values + more, max(depth, deep + 1)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            limit = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            refuse(limit, node)
    known[id(node)] = values, depth
    return values, depth


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package, sorted."""
    return sorted(
        Path(item.name).stem
        for item in resources.files("trace_ds.recipes").iterdir()
        if item.name.endswith((".yaml", ".yml"))
    )


def recipe_text(name: str) -> str:
    return (resources.files("trace_ds.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def read_config_text(config: str) -> tuple[str, str]:
    """(text, where) of a configuration file or of a recipe by name."""
    path = Path(config)
    if _is_file(path):
        try:
            with path.open(encoding="utf-8-sig") as handle:
                return handle.read(MAX_CHARACTERS + 1), str(path)
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 (byte {error.start})", str(path), "save the file as UTF-8") from None
    if config in recipe_names():
        return recipe_text(config), f"recipe {config}"
    close = difflib.get_close_matches(config, recipe_names(), 1)
    hint = f"did you mean the recipe {close[0]!r}? " if close else ""
    raise UserError(
        "no such configuration file or recipe",
        config,
        f"{hint}`trace-ds recipes` lists {', '.join(recipe_names())}",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def load_config(config: str, overrides: Sequence[str] = (), run_dir: str | Path | None = None) -> tuple[Config, Path]:
    """Read, override, substitute and validate a configuration.

    Args:
        config: path of a YAML file or the name of a recipe.
        overrides: ``dotted.key=value`` strings; values are YAML.
        run_dir: the run directory; default ``runs/NAME``. ``${run_dir}`` in any string of the file is replaced by it,
            ``${run_parent}`` by its parent, ``${config_dir}`` by the folder of the file.

    Returns:
        The configuration and the run directory.

    Raises:
        UserError: the file cannot be read or is not valid; the message names the key.
    """
    text, where = read_config_text(config)
    try:
        raw = _substitute(parse_yaml(text), {})  # a copy: aliases would share what an override changes
    except ValueError as error:
        raise UserError(str(error), where, "correct the file") from None
    if not isinstance(raw, dict):
        raise UserError("the file holds no keys", where, "start from a recipe: `trace-ds recipes --show NAME`")
    for override in overrides:
        _apply(raw, override)
    name = raw.get("name")
    try:
        directory = Path(expanded(str(run_dir if run_dir is not None else Path("runs") / str(name or "unnamed"))))
    except ValueError as error:
        raise UserError(str(error), "--run-dir", "choose another directory, or name") from None
    values = {
        "run_dir": str(directory),
        "run_parent": str(directory.parent),
        "config_dir": str(Path(config).parent if _is_file(Path(config)) else "."),
    }
    loaded = validate(_substitute(raw, values), where)
    problem = _setting_of_another_loss(loaded)
    if problem and not is_resolved(text):  # a run that an older version wrote out is read as it was
        raise UserError(problem, where, "take it out, or choose that loss")
    return loaded, directory


def _setting_of_another_loss(config: Config) -> str:
    """What is set for a loss that neither the run nor the variant it stands in uses: it would change nothing."""
    own = config.unlearning
    for loss in LOSS_SECTIONS:
        used = {own.forget_loss, *(changes.get(LOSS_KEY) for changes in _changes(config))}
        if loss not in used and getattr(own, loss) != type(own).model_fields[loss].default:
            return f"unlearning.{loss} is a setting of another loss than unlearning.forget_loss {own.forget_loss}"
    for name, changes in config.variants.items():
        used_here = changes.get(LOSS_KEY, own.forget_loss)
        for key in changes:
            section = key.removeprefix("unlearning.").split(".")[0]
            if key.startswith("unlearning.") and section in LOSS_SECTIONS and section != used_here:
                return f"variants.{name}: {key} is a setting of another loss than {used_here}"
    return ""


def _changes(config: Config) -> list[dict[str, Any]]:
    """All that is changed of the configuration in runs that it names."""
    bench = config.bench
    studied = [] if bench is None else [*bench.methods.values(), *bench.losses.values()]
    return [*config.variants.values(), *studied]


def validate(raw: dict[str, Any], where: str) -> Config:
    """Check a mapping against the schema; the first problem becomes a :class:`UserError`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, where) from None


def with_changes(config: Config, changes: dict[str, Any], where: str) -> Config:
    """A copy of ``config`` with dotted keys changed (for variants), validated again."""
    raw = config.model_dump(mode="json")
    for key, value in changes.items():
        _set(raw, key, value)
    return validate(raw, where)


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_resolved(text: str) -> bool:
    """Whether a file is what :func:`dump_yaml` writes, of this version or an older one: every section, no comment."""
    sections = ("name", "seed", "model", "data", "distributed", "statistics", "calibration", "unlearning", "evaluation")
    try:
        raw = yaml.load(text, _Loader)
        whole = isinstance(raw, dict) and all(name in raw for name in sections)
        return whole and yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True) == text
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"{_shown(override)} is not KEY=VALUE", "--set", "write for example --set unlearning.steps=200")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise UserError(f"the value of {_shown(key)} is {error}: {_shown(value)}", "--set", "quote the value") from None
    _set(raw, key.strip(), parsed)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(
                f"{_shown(key)}: {_shown(parent)} is not a section", "--set", "see `trace-ds run CONFIG --dry-run`"
            )
    node[last] = value


def _substitute(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace("${" + name + "}", text)
        return value
    if isinstance(value, dict):
        return {key: _substitute(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, values) for item in value]
    return value


def _shown(value: Any) -> str:
    """What was found, short enough for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _explain(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = _section_at(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), list(section), 1, cutoff=0.5)
        nearest = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(section)}"
        return UserError(f"unknown key {_shown(location)}", where, nearest)
    if first["type"] == "missing":
        return UserError(f"the key {location!r} is missing", where, f"add {location}: …")
    message = str(first["msg"]).removeprefix("Value error, ")
    found = f" (found {_shown(first['input'])})" if isinstance(first["input"], str | int | float | bool | None) else ""
    if not location:
        return UserError(message, where, "change one of the two keys")
    return UserError(f"{location}: {message}{found}", where, f"correct the value of {location}")


def _section_at(location: Sequence[int | str]) -> Sequence[str]:
    """The valid keys of the section at a pydantic error location."""
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        found = _model_in(section.model_fields[str(part)].annotation)
        if found is not None:
            section = found
    return list(section.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, dict, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (found := _model_in(argument)) is not None:
                return found
    return None
