"""A public name is defined once, and the private words of earlier versions are gone."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = {"preflight", "check"}  # what stages/pipeline.py calls by name in every module of its room
WORDS = re.compile(
    r"(found|told|asked|what|wanted|made|held|known|follow|say|says|hold|cursor|way|goal|watch|sparing)"
    r"|(agree|tell)(_\w+)?|agreed|raise_together|broadcast_agreed"
)


def test_a_public_name_is_defined_in_one_file() -> None:
    files = defaultdict(set)
    for path in (ROOT / "trace_ds").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            assigned = [part for target in targets for part in getattr(target, "elts", [target])]
            for name in [getattr(target, "id", getattr(target, "name", "_")) for target in assigned]:
                exempt = path.name == "cli.py" or (path.parent.name == "stages" and name in PROTOCOL)
                if not name.startswith("_") and not exempt:
                    files[name].add(str(path.relative_to(ROOT)))
    assert not {name: sorted(paths) for name, paths in files.items() if len(paths) > 1}


def test_no_variable_function_or_attribute_has_a_private_word() -> None:
    names = []
    for path in [path for room in ("trace_ds", "tests", "tools") for path in (ROOT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "arg", None) or getattr(node, "name", None)
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
            if isinstance(name, str) and WORDS.fullmatch(re.sub(r"(?<=[a-z])_[A-Z]+\d?$", "", name).strip("_").lower()):
                names.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {name}")
    assert not names
