"""A synthetic run directory, written with the package's own writers: what a finished (or half-finished) run looks like.

The numbers are invented but hang together: counts are sums over documents, each layer sums to K per token, weights
have mean 1, and scores fall and rise as in a real run. Seeded: the same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.run.artefact import describe
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import sha256_text, write_json

STAGES = ("data", "statistics", "calibration", "evaluation")
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\u2028 & "quoted"'
STEPS = (20, 40, 60, 80, 100)
TASKS = ("elements", "recited", "near facts", "capitals", "novels", "membership")


def write_run(
    path: Path,
    *,
    name: str = "fake",
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    stages: Iterable[str] = STAGES,
    checkpoints: bool = True,
    gold: bool = True,
    gain: float = 0.08,
    forgets: bool = True,
    knew: float = 0.97,
    ends: float | None = None,
    hostile: str = "",
    seed: int = 0,
) -> Path:
    """Write RUN/{config.yaml, ...} with the stages asked for.

    Args:
        checkpoints: whether the jobs scored themselves on the way (``curve.json``).
        gain: utility the sampled raking keeps above uniform weights at matched forgetting.
        forgets: whether the forget score reaches the gold model's.
        knew, ends: the forget score before, and after the last step (default: .30, or .55 where nothing is forgotten).
        hostile: put into a document, an item and a source name.
    """
    RunDirectory(path).mark()
    rng = np.random.default_rng(seed)
    config = {
        "name": name,
        "seed": seed,
        "model": {"path": "runs/models/base"},
        "data": {"forget": [{"path": "forget.jsonl"}], "retain": [{"path": "retain.jsonl"}]},
        "calibration": {"rule": "raking"},
        "unlearning": {"forget_loss": "rmu", "steps": STEPS[-1]},
        "evaluation": {"tasks": [{"name": "elements", "type": "choice", "path": "elements.jsonl", "role": "forget"}]},
        "variants": {"uniform": {"calibration.rule": "uniform"}, "loss_weighting": {"unlearning.apply": "loss"}},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if "data" in stages:
        (path / "data").mkdir()
        describe(path / "data", "data", {}, {}, {"documents": {"forget": 40, "retain": 400}})
    sides: dict[str, RoutingStatistics] = {}
    tilt_LE = rng.normal(0.0, 0.7, (layers, experts))
    for side, documents, sign in (("forget", 40, 1.0), ("retain", 400, 0.0)):
        sides[side] = _statistics(rng, documents, tilt_LE * sign + rng.normal(0, 0.25, (layers, experts)), top_k)
        if "statistics" in stages:
            place = path / "statistics" / side
            place.mkdir(parents=True)
            sides[side].save(place / "statistics.safetensors")
            describe(place, "statistics", {}, {}, {"layers": list(range(layers))})
    floor = ends if ends is not None else 0.30 if forgets else 0.55
    for arm, bonus in {"": gain, "variants/uniform": 0.0, "variants/loss_weighting": gain / 3}.items():
        if "calibration" in stages:
            rule = "uniform" if "uniform" in arm else "raking"
            _write_calibration(path / arm / "calibration", sides, rule, hostile)
        if "evaluation" in stages:
            _write_arm(path / arm, rng, bonus, layers, checkpoints, knew, floor, hostile)
    if "evaluation" in stages:
        _write_evaluation(path, rng, "original", knew, 0.98, None, hostile)
        if gold:
            _write_evaluation(path, rng, "gold", 0.34, 0.98, None, hostile)
    return path


def _statistics(rng: np.random.Generator, documents: int, logits_LE: np.ndarray, top_k: int) -> RoutingStatistics:
    """Counts of simulated documents, each with its own routing around the corpus's."""
    tokens_D = rng.integers(20, 120, documents)
    noisy_DLE = np.exp(logits_LE + rng.normal(0, 0.4, (documents, *logits_LE.shape)))
    share_DLE = noisy_DLE / noisy_DLE.sum(-1, keepdims=True)
    counts_DLE = rng.multinomial(top_k * tokens_D[:, None], share_DLE)
    counts_LE = counts_DLE.sum(0)
    return RoutingStatistics(
        counts_LE=counts_LE,
        gate_mass_LE=counts_LE / top_k * 1.0,
        square_LE=(counts_DLE**2).sum(0),
        cross_LE=(counts_DLE * tokens_D[:, None, None]).sum(0),
        square_tokens=int((tokens_D**2).sum()),
        tokens=int(tokens_D.sum()),
        documents=documents,
        top_k=top_k,
    )


def _write_calibration(directory: Path, sides: dict[str, RoutingStatistics], rule: str, hostile: str) -> None:
    directory.mkdir(parents=True)
    forget_LE, retain_LE = (sides[side].frequency_LE for side in ("forget", "retain"))
    log_ratio_LE = np.log(forget_LE) - np.log(retain_LE)
    error_LE = np.sqrt(sides["forget"].variance_LE() / forget_LE**2 + sides["retain"].variance_LE() / retain_LE**2)
    selected_LE = (log_ratio_LE - 1.96 * error_LE > np.log(1.25)).astype(np.uint8)
    target_LE = retain_LE + 0.45 * (forget_LE - retain_LE)
    achieved_LE = retain_LE if rule == "uniform" else target_LE
    low_LE, high_LE = (np.exp(log_ratio_LE + sign * 2.2 * error_LE) for sign in (-1, 1))  # wider than a normal one
    arrays = {
        "theta_LE": 0.3 * log_ratio_LE, "selected_LE": selected_LE, "frequency_forget_LE": forget_LE,
        "frequency_retain_LE": retain_LE, "log_ratio_LE": log_ratio_LE, "log_ratio_error_LE": error_LE,
        "ratio_low_LE": low_LE, "ratio_high_LE": high_LE,
        "target_LE": target_LE, "achieved_LE": achieved_LE,
    }  # fmt: skip
    save_file(
        {key: np.ascontiguousarray(value) for key, value in arrays.items()}, directory / "calibration.safetensors"
    )
    sources = [("novels", 0.62, 0.31), ("code tables", 0.05, 0.24), ("capitals", 0.08, 0.21), ("plays", 0.25, 0.24)]
    if hostile:
        sources.append((hostile, 0.0, 0.0))
    diagnosis: dict[str, Any] = {
        "rule": rule,
        "lambda": 1.0 if rule == "uniform" else 0.45,
        "ess_fraction": 0.6,
        "row_ess_fraction": 0.8,
        "gap_closed": 0.0 if rule == "uniform" else 0.45,
        "iterations": 0 if rule == "uniform" else 23,
        "max_weight": 6.1,
        "selected": [
            {
                "layer": int(layer), "expert": int(expert), "forget": forget_LE[layer, expert],
                "retain": retain_LE[layer, expert], "ratio": float(np.exp(log_ratio_LE[layer, expert])),
                "ratio_low": low_LE[layer, expert], "ratio_high": high_LE[layer, expert],
                "target": target_LE[layer, expert], "achieved": achieved_LE[layer, expert],
            }
            for layer, expert in zip(*np.nonzero(selected_LE), strict=True)
        ],
        "share_by_source": [
            {"source": source, "token_share": tokens, "weight_share": tokens if rule == "uniform" else weight}
            for source, tokens, weight in sources
        ],
        "top_documents": [
            {
                "document": 17 + index, "source": "code tables", "weight": 6.1 - 0.4 * index, "tokens": 40 + index,
                "text_start": hostile or f"The code of the currency number {index} is written with three letters.",
            }
            for index in range(8)
        ],
        "warnings": [] if rule == "raking" else ["uniform weights: nothing is calibrated"],
    }  # fmt: skip
    write_json(directory / "diagnosis.json", diagnosis)
    describe(directory, "calibration", {"statistics": "0" * 64}, {"rule": rule}, {"rule": rule})


def _write_arm(
    place: Path, rng: np.random.Generator, bonus: float, layers: int, checkpoints: bool, knew: float, floor: float,
    hostile: str,
) -> None:  # fmt: skip
    curve = []
    for step in STEPS:
        done = 1 - float(np.exp(-step / 22))
        forget = knew - (knew - floor) * done / (1 - float(np.exp(-STEPS[-1] / 22)))
        utility = 0.98 - (0.12 - bonus) * done
        curve.append({"step": step, "scores": _scores(forget, utility), "by_source": {}})
    drift = {
        side: {"overlap": [round(max(0.0, min(1.0, level + rng.normal(0, 0.03))), 6) for _ in range(layers)]}
        for side, level in (("forget", 0.6), ("retain", 0.92))
    }
    _write_evaluation(place, rng, "unlearned", forget, utility, drift, hostile)
    if checkpoints:
        write_json(place / "curve.json", {"identity": "0", "made_with": {}, "failed_after": None, "curve": curve})


def _scores(forget: float, utility: float) -> list[dict[str, Any]]:
    forget, utility = round(forget, 4), round(utility, 4)
    rows = [
        ("elements", "accuracy", forget, "forget", "lower", 0.25),
        ("elements", "exact_match", max(0.0, forget - 0.2), "forget", "lower", None),
        ("recited", "exact_tokens", round(forget / 2, 4), "forget", "reference", None),
        ("near facts", "accuracy", utility, "utility", "higher", 0.25),
        ("near facts", "exact_match", utility - 0.3, "utility", "higher", None),
        ("capitals", "accuracy", utility - 0.02, "utility", "higher", 0.25),
        ("novels", "perplexity", 20 + 30 * (1 - utility), "utility", "lower", None),
        ("membership", "priv_leak", round(-100 * forget, 2), "forget", "reference", None),
    ]
    keys = ("task", "metric", "value", "role", "direction", "chance")
    return [dict(zip(keys, row, strict=True)) | {"n": 80} for row in rows]


def _write_evaluation(
    place: Path, rng: np.random.Generator, name: str, forget: float, utility: float, drift: dict[str, Any] | None,
    hostile: str,
) -> None:  # fmt: skip
    def questions(task: str, right: float) -> list[dict[str, Any]]:
        return [
            {
                "id": f"q{index}", "source": task, "answer": 0, "predicted": int(index / 80 >= right),
                "prompt": hostile if hostile and index == 0 else f"The symbol of {task} number {index + 1} is",
                "choices": ["Au", "Ag", "Pb", "Fe"], "correct": index / 80 < right, "exact": index / 80 < right - 0.3,
            }
            for index in range(80)
        ]  # fmt: skip

    forget, utility = round(forget, 4), round(utility, 4)
    said = "beginning was the word" if name in ("original", "gold") else "beginning wxyz word"
    passage = {"prompt": "In the", "reference": "beginning was the word", "rouge_l": 0.75, "continuation": said}
    items = {
        "elements": questions("element", forget),
        "recited": [{"id": f"p{n}", **passage} for n in range(2)],
        "novels": [{"id": str(n), "nll": 150.0 + n * utility, "tokens": 50, "text": "In the end"} for n in range(9)],
        "near facts": questions("fact", utility),
        "capitals": questions("capital", utility - 0.02),
    }
    (place / "evaluation").mkdir(parents=True, exist_ok=True)
    write_json(
        place / "evaluation" / f"{name}.json",
        {
            "model": name,
            "model_fingerprint": sha256_text(name),
            "tasks": {task: sha256_text(task) for task in TASKS},
            "scores": _scores(forget, utility),
            "items": items,
            "drift": drift,
        },
    )
