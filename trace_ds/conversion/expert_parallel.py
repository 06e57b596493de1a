"""DeepSpeed's expert-parallel layout (ZeRO stage 0) as a target: weights that an AutoEP engine of any EP size loads.

    engine.load_checkpoint(DST, tag="model", load_module_only=True)

``DST/model/mp_rank_00_model_states.pt`` holds what every rank has, ``layer_L_expert_E_mp_rank_00_model_states.pt`` one
expert each; a rank reads the experts it owns, so the files are the same for every EP size.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from trace_ds.conversion.convert import Plan
from trace_ds.conversion.layouts import ROUTER_TWICE, fused_to_engine, layer_metadata, moe_prefixes
from trace_ds.conversion.runs import TensorSource
from trace_ds.conversion.safetensors_target import DTYPE_NAMES
from trace_ds.conversion.stream import Progress, warnings_of
from trace_ds.conversion.torch_writer import Streamed, StreamedArchive, stream_archives

TAG = "model"


def write_expert_parallel(plan: Plan, work: Path, *, jobs: int, progress: Progress | None) -> dict[str, Any]:
    """The files below ``work/model`` and ``latest``; the tensors' part of the report."""
    layout = plan.layout
    prefixes = moe_prefixes(layout)
    engine = fused_to_engine(layout, plan.fused)
    module: OrderedDict[str, Streamed] = OrderedDict()
    archives = []
    layers = []
    for number, prefix in enumerate(prefixes):
        weights = {weight: engine.pop(f"{prefix}.experts.{weight}") for weight in ("w1", "w2", "w3")}
        experts = weights["w1"].shape[0]
        layers.append(layer_metadata(number, prefix, experts))
        for expert in range(experts):
            one = {
                f"{prefix}.experts.{weight}.{expert}": _streamed(plan, _expert(source, expert))
                for weight, source in weights.items()
            }
            path = work / TAG / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
            archives.append(StreamedArchive(path, one))
    for name, source in engine.items():
        module[name] = _streamed(plan, source)
    for alias, name in layout.tied.items():
        module[alias] = module[name]
    if layout.config.model_type in ROUTER_TWICE:
        for prefix in prefixes:
            module[f"{prefix}.gate.gate.weight"] = module[f"{prefix}.router.gate.weight"]
    state: dict[str, Any] = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": dict(layout.tied),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": plan.checkpoint.step or 0,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": "0.19.8",
        "num_experts": [layer["num_experts"] for layer in layers],
        "ds_autoep_layers": layers,
    }
    archives.append(StreamedArchive(work / TAG / "mp_rank_00_model_states.pt", state))
    (work / "latest").write_text(TAG + "\n", encoding="utf-8")
    results = stream_archives(archives, work, jobs, progress)
    return {
        "tensors": {
            f"{task.source.name}": {
                "file": str(task.path.relative_to(work)) if task.path else "",
                "dtype": DTYPE_NAMES[task.dtype],
                "shape": list(task.source.shape),
                "sha256": result.sha256,
            }
            for task, result in sorted(results, key=lambda pair: pair[0].source.name)
        },
        "parameters": sum(source.numel for source in plan.fused.values()),
        "bytes": sum(task.nbytes for task, _ in results),
        "notes": plan.notes,
        "warnings": warnings_of([task.source.name for task, _ in results], [result for _, result in results]),
    }


def _streamed(plan: Plan, source: TensorSource) -> Streamed:
    return Streamed(source, plan.dtype_of(source.name, source), source.shape)


def _expert(source: TensorSource, expert: int) -> TensorSource:
    shape = source.shape[1:]
    each = source.numel // source.shape[0]
    runs = tuple(source.slice_runs(expert * each, each))
    return TensorSource(f"{source.name}.{expert}", shape, source.dtype, runs)
