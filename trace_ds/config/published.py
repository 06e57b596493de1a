"""The published ``config.json`` of each model fragment: what a model's shapes are before it is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trace_ds.config.compose import GROUPS, parse_file, recipe_names


def published_config_path(fragment: str) -> Path:
    """Of a model fragment by name."""
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
