"""From a YAML file (or the name of a shipped recipe) and ``--set`` overrides to a checked :class:`Config`."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trace_ds.config.schema import Config
from trace_ds.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error, and 1e-5 is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


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
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
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
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "syntax"
        raise UserError(f"not valid YAML{line} ({problem})", where, "correct the syntax") from None
    if not isinstance(raw, dict):
        raise UserError("the file holds no keys", where, "start from a recipe: `trace-ds recipes --show NAME`")
    for override in overrides:
        _apply(raw, override)
    name = raw.get("name")
    directory = Path(run_dir) if run_dir is not None else Path("runs") / str(name or "unnamed")
    values = {
        "run_dir": str(directory),
        "run_parent": str(directory.parent),
        "config_dir": str(Path(config).parent if Path(config).is_file() else "."),
    }
    return validate(_substitute(raw, values), where), directory


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
        raise UserError(f"{override!r} is not KEY=VALUE", "--set", "write for example --set unlearning.steps=200")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"the value of {key} is not valid YAML: {value!r}", "--set", "quote the value") from None
    _set(raw, key.strip(), parsed)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"{key}: {parent} is not a section", "--set", "see `trace-ds run CONFIG --dry-run`")
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


def _explain(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = _section_at(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), list(section), 1, cutoff=0.5)
        nearest = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(section)}"
        return UserError(f"unknown key {location!r}", where, nearest)
    if first["type"] == "missing":
        return UserError(f"the key {location!r} is missing", where, f"add {location}: …")
    message = str(first["msg"]).removeprefix("Value error, ")
    found = f" (found {first['input']!r})" if isinstance(first["input"], str | int | float | bool | None) else ""
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
