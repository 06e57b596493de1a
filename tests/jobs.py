"""Bodies that tests run on every rank (importable by the worker processes), and the single-process references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trace_ds.config.load import load_config
from trace_ds.run.directory import RunDirectory


def collect_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> None:
    """``collect`` as one rank of a job."""
    from trace_ds.stages.collect import collect

    loaded, directory = load_config(config, overrides, run_dir)
    collect(loaded, RunDirectory.at(directory), world)


def unlearn_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> None:
    """``unlearn`` as one rank of a job."""
    from trace_ds.stages.unlearn import unlearn

    loaded, directory = load_config(config, overrides, run_dir)
    unlearn(loaded, RunDirectory.at(directory), world)


def brute_force_routing(model_path: Path, arrow: Path, top_k: int) -> dict[str, np.ndarray]:
    """Counts by plain transformers, one document piece at a time, from the router logits; no code of ours but the rows.

    Returns:
        counts [L, E], gate mass [L, E], and by document {document: counts [L, E]}.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from trace_ds.corpora.dataset import TokenDataset

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    dataset = TokenDataset.open(arrow)
    counts = mass = None
    documents: dict[int, np.ndarray] = {}
    for number in range(len(dataset)):
        row = dataset.row(number)
        for document in np.unique(row.document_ids):
            ids = row.input_ids[row.document_ids == document]
            if len(ids) < 2:
                continue
            with torch.no_grad():
                output = model(input_ids=torch.tensor(ids[None].astype(np.int64)), output_router_logits=True)
            found = np.zeros((len(output.router_logits), output.router_logits[0].shape[-1]), dtype=np.int64)
            gates = np.zeros(found.shape)
            for layer, logits in enumerate(output.router_logits):
                probabilities = torch.softmax(logits.double(), dim=-1)[:-1]  # the last position has no loss
                values, indices = probabilities.topk(top_k, dim=-1)
                values = values / values.sum(-1, keepdim=True)
                np.add.at(found[layer], indices.reshape(-1).numpy(), 1)
                np.add.at(gates[layer], indices.reshape(-1).numpy(), values.reshape(-1).numpy())
            counts = found if counts is None else counts + found
            mass = gates if mass is None else mass + gates
            documents[int(document)] = documents.get(int(document), 0) + found
    assert counts is not None and mass is not None
    return {"counts": counts, "mass": mass, "documents": np.stack(list(documents.values()))}
