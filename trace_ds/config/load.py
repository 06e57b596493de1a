"""From YAML files (or names of recipes) and ``--set`` overrides to a checked :class:`Config`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from trace_ds.config.compose import compose, dump_text, parse_yaml, recipes, require_whole, substitute
from trace_ds.config.schema import Config
from trace_ds.config.sections.base import Section, expanded
from trace_ds.errors import UserError

SHOWN_CHARACTERS = 60
LOSS_KEY = "unlearning.forget_loss"
# Sections of one forget loss each. That of rmu is none: its layer is also that of hidden_mse, and recipes give it a
# coefficient and leave the loss to --set, to variants and to studies.
LOSS_SECTIONS = ("npo", "simnpo", "dpo")


def load_config(
    config: str | Sequence[str], overrides: Sequence[str] = (), run_dir: str | Path | None = None
) -> tuple[Config, Path]:
    """Read, merge, override, substitute and validate a configuration.

    Args:
        config: path of a YAML file or the name of a recipe, or several of them, merged from left to right.
        overrides: ``dotted.key=value`` strings; values are YAML.
        run_dir: the run directory; default ``runs/NAME``. ``${run_dir}`` in any string of a file is replaced by it,
            ``${run_parent}`` by its parent, ``${config_dir}`` by the folder of the file, ``${seed}`` by the seed.

    Returns:
        The configuration and the run directory.

    Raises:
        UserError: a file cannot be read or is not valid; the message names the key.
    """
    composed = compose([config] if isinstance(config, str) else config)
    raw, where = composed.raw, composed.where
    for override in overrides:
        _apply(raw, override)
    require_whole(composed, raw)
    if composed.name is not None:
        raw = {"name": composed.name} | raw
    name = raw.get("name")
    try:
        directory = Path(expanded(str(run_dir if run_dir is not None else Path("runs") / str(name or "unnamed"))))
    except ValueError as error:
        raise UserError(str(error), "--run-dir", "choose another directory, or name") from None
    values = {"run_dir": str(directory), "run_parent": str(directory.parent), "config_dir": composed.folder}
    values["seed"] = str(raw.get("seed", 0))
    loaded = validate(substitute(raw, values), where)
    problem = _setting_of_another_loss(loaded)
    if problem:
        raise UserError(problem, where, "take it out, or choose that loss")
    return loaded, directory


def _setting_of_another_loss(config: Config) -> str:
    """The first setting of a loss that neither the run nor the variant it stands in uses: it would change nothing."""
    own, bench = config.unlearning, config.bench
    studied = [] if bench is None else bench.methods.values()
    used = {own.forget_loss, *(changes.get(LOSS_KEY) for changes in (*config.variants.values(), *studied))}
    for loss in LOSS_SECTIONS:
        if loss not in used and getattr(own, loss) != type(own).model_fields[loss].default:
            return f"unlearning.{loss} is a setting of another loss than unlearning.forget_loss {own.forget_loss}"
    for name, changes in config.variants.items():
        used_here = changes.get(LOSS_KEY, own.forget_loss)
        for key in changes:
            section = key.removeprefix("unlearning.").split(".")[0]
            if key.startswith("unlearning.") and section in LOSS_SECTIONS and section != used_here:
                return f"variants.{name}: {key} is a setting of another loss than {used_here}"
    return ""


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


def variants_of(config: Config) -> dict[str, Config]:
    """The configuration of each variant, a run of its own beside the run's."""
    return {name: with_changes(config, changes, f"variants.{name}") for name, changes in config.variants.items()}


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return dump_text(config.model_dump(mode="json"))


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
            problem = f"{_shown(key)}: {_shown(parent)} is a value and has no keys"
            raise UserError(problem, "--set", f"end the key with {parent}")
    node[last] = value


def _shown(value: Any) -> str:
    """What was found, short enough for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _explain(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    keys = [part for part in first["loc"] if not re.match(r"(list|literal|dict)\[", str(part))]  # else: one of a union
    location = ".".join(map(str, keys))
    if first["type"] == "unknown_key":
        key = ".".join(map(str, [*keys, first["ctx"]["key"]]))
        return UserError(f"unknown key {_shown(key)}", where, first["ctx"]["hint"])
    if first["type"] == "missing":
        return UserError(f"the key {location!r} is missing", where, f"add {location}: …")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = f" (found {_shown(first['input'])})" if isinstance(first["input"], str | int | float | bool | None) else ""
    if not location:
        return UserError(message, where, "change one of the two keys")
    return UserError(f"{location}: {message}{given}", where, f"correct the value of {location}")


def complete_config(incomplete: str) -> list[str]:
    """Names of recipes, YAML files and folders that begin so: what a shell completes CONFIG with."""
    folder, _, beginning = incomplete.rpartition("/")
    place = Path(expanded(folder)) if folder else Path("/" if incomplete.startswith("/") else ".")
    entries = sorted(place.iterdir()) if place.is_dir() else []
    shown = [entry for entry in entries if entry.is_dir() or entry.suffix in (".yaml", ".yml")]
    prefix = incomplete.removesuffix(beginning)
    files = [f"{prefix}{entry.name}{'/' * entry.is_dir()}" for entry in shown if not entry.name.startswith(".")]
    return [name for name in (*recipes(), *files) if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """The keys that begin so, as ``dotted.key=``: what a shell completes ``--set`` with."""
    return [key for key in _keys(Config) if key.startswith(incomplete)]


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if issubclass(kind, Section)), None)
        if inner is None or get_origin(field.annotation) in (list, dict):
            yield f"{prefix}{name}="
        else:
            yield from _keys(inner, f"{prefix}{name}.")
