"""Fixtures shared by the tests: one tiny model, one prepared and collected run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-layer, 4-expert, top-2 Mixtral in fp32 with its tokenizer."""
    return tiny.make_model(tmp_path_factory.mktemp("mixtral"))
