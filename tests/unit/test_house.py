"""The rooms of trace_ds/ import as docs/architecture.md says: only what its table allows, and never in a circle."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "trace_ds"
FREE = ("terminal", "errors")  # the table says that anybody may import them
DATA = ("recipes",)  # no code


def table() -> dict[str, list[str]]:
    """Room -> rooms that it may import, in the order of the table: bottom to top."""
    rooms: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 5 or not cells[1].startswith("`"):
            continue
        above = list(rooms)
        for room in re.findall(r"`(\w+)(?:\.py|/)`", cells[1]):
            rooms[room] = (
                above
                if cells[3] == "all above"
                else [*re.findall(r"`(\w+)`", cells[3]), *(one for one in FREE if one in above)]
            )
    return rooms


@functools.cache
def sources() -> dict[str, str]:
    """Dotted name of every module -> its text."""
    result = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return result


@functools.cache
def parsed(text: str) -> list[ast.AST]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(text: str, modules: dict[str, str]) -> Iterator[str]:
    """The modules of the package that a text imports: at its top, in functions, or for annotations only."""
    for node in parsed(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written from the package on"
            for alias in node.names if node.module in modules else ():
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def forbidden(modules: dict[str, str]) -> list[str]:
    """Imports between rooms that the table does not allow."""
    rooms = table()
    return [
        f"{module} imports {other}"
        for module, text in modules.items()
        for other in imports(text, modules)
        if room_of(module) in rooms and room_of(other) not in ("", room_of(module), *rooms[room_of(module)])
    ]


def circle(modules: dict[str, str]) -> list[str]:
    """The files of a circle of imports, if there is one."""
    graph = {module: set(imports(text, modules)) for module, text in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_the_table_names_the_rooms_that_there_are() -> None:
    entries = [entry for entry in (ROOT / PACKAGE).iterdir() if not entry.name.startswith("__")]
    here = {entry.stem for entry in entries if entry.suffix == ".py" or (entry / "__init__.py").is_file()}
    assert sorted(table()) == sorted(here.difference(DATA))


def test_a_room_imports_what_stands_above_it_in_the_table() -> None:
    rooms = table()
    names = list(rooms)
    for room, allowed in rooms.items():
        assert set(allowed) <= set(names[: names.index(room)]), f"{room} may import what does not stand above it"
    assert forbidden(sources()) == []


def test_no_circle_of_files() -> None:
    assert circle(sources()) == []


def test_the_stages_open_the_configuration() -> None:
    """A room below them gets a section or values, never all of it."""
    rooms = list(table())
    below = {*rooms[: rooms.index("stages")], ""}.difference({"config"})
    result = {
        module
        for module, text in sources().items()
        for node in parsed(text)
        if room_of(module) in below
        and isinstance(node, ast.ImportFrom)
        and node.module == "trace_ds.config.schema"
        and "Config" in [alias.name for alias in node.names]
    }
    assert not result


def test_what_the_page_names_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/\w+\.py)(?::(\w+))?`", text)
    assert len(named) > 30
    for file, name in named:
        path = ROOT / file if file.startswith("tests/") else ROOT / PACKAGE / file
        assert re.search(rf"^(def|class) {name}" if name else "", path.read_text(encoding="utf-8"), re.MULTILINE), name


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("trace_ds.run.files", "from trace_ds.stages.inspect import inspect"),
        ("trace_ds.run.files", "def lazy():\n    from trace_ds.models import loading"),
        ("trace_ds.models.engine", "if TYPE_CHECKING:\n    from trace_ds.unlearning.trainer import train"),
        ("trace_ds.terminal", "import trace_ds.errors"),
        ("trace_ds.tensors.runs", "from trace_ds.parallel.world import World"),  # above, and not allowed
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    modules = sources()
    assert len(forbidden(modules | {module: f"{modules[module]}\n{line}\n"})) == len(forbidden(modules)) + 1


@pytest.mark.parametrize(
    "line",
    ["from trace_ds.tensors.opening import open_source", "def lazy():\n    from trace_ds.tensors import opening"],
)
def test_a_circle_is_found(line: str) -> None:
    modules = {module: text for module, text in sources().items() if room_of(module) == "tensors"}
    result = circle(modules | {"trace_ds.tensors.checkpoint": f"{modules['trace_ds.tensors.checkpoint']}\n{line}\n"})
    assert "trace_ds.tensors.checkpoint" in result and "trace_ds.tensors.opening" in result
