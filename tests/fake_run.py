"""A synthetic run directory, written with the documented writers: what a finished (or half-finished) run looks like.

The numbers are invented but hang together: counts are sums over documents, each layer sums to K per token, weights
have mean 1, and scores fall and rise as in a real run. Seeded: the same arguments give the same bytes.

    python -m tests.fake_run OUT [layers experts]
"""

from __future__ import annotations

import sys
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
RECITED = [
    {"id": f"p{n}", "prompt": "In the", "reference": "beginning was the word", "rouge_l": 0.75} for n in range(2)
]
VARIANTS = ("uniform", "loss_weighting")


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
    gain: float = 0.06,
    forgets: bool = True,
    knew: float = 0.97,
    ends: float | None = None,
    hostile: str = "",
    model: str = "model",
    data: str = "data",
    seed: int = 0,
) -> Path:
    """Write RUN/{config.yaml, ...} with the stages asked for.

    Args:
        gain: utility the sampled raking keeps above uniform weights at matched forgetting.
        forgets: whether the forget score reaches the gold model's.
        knew, ends: the forget score before, and after the last step (default: .30, or .55 where nothing is forgotten).
        hostile: put into a document, an item and a source name.
        model, data: what the fingerprints are made of.
    """
    RunDirectory(path).mark()
    stages = set(stages)
    rng = np.random.default_rng(seed)
    tasks = [{"name": "elements", "type": "choice", "path": "elements.jsonl", "role": "forget"}]
    config = {
        "name": name,
        "seed": seed,
        "model": {"path": "runs/models/base"},
        "data": {"forget": [{"path": "forget.jsonl"}], "retain": [{"path": "retain.jsonl"}]},
        "calibration": {"rule": "raking"},
        "unlearning": {"forget_loss": "rmu", "steps": STEPS[-1]},
        "evaluation": {"tasks": tasks},
        "variants": {"uniform": {"calibration.rule": "uniform"}, "loss_weighting": {"unlearning.apply": "loss"}},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    fingerprints = {"model": sha256_text(model), "data": sha256_text(data)}
    if "data" in stages:
        (path / "data").mkdir()
        (path / "data" / "forget.arrow").write_bytes(data.encode())
        describe(
            path / "data", "data", {"forget": fingerprints["data"]}, {}, {"documents": {"forget": 40, "retain": 400}}
        )
    sides: dict[str, RoutingStatistics] = {}
    tilt_LE = rng.normal(0.0, 0.7, (layers, experts))
    for side, documents, sign in (("forget", 40, 1.0), ("retain", 400, 0.0)):
        sides[side] = _statistics(rng, documents, tilt_LE * sign + rng.normal(0, 0.25, (layers, experts)), top_k)
        if "statistics" in stages:
            _write_statistics(path / "statistics" / side, sides[side], fingerprints)
    if "calibration" in stages:
        _write_calibration(path / "calibration", sides, "raking", hostile)
        _write_calibration(path / "variants" / "uniform" / "calibration", sides, "uniform", hostile)
        _write_calibration(path / "variants" / "loss_weighting" / "calibration", sides, "raking", hostile)
    floor = ends if ends is not None else 0.30 if forgets else 0.55
    arms = {"": gain, "variants/uniform": 0.0, "variants/loss_weighting": gain / 3}
    for place, bonus in arms.items():
        if "evaluation" in stages:
            _write_arm(path / place / "evaluation", rng, bonus, layers, checkpoints, knew, floor, hostile, fingerprints)
    if "evaluation" in stages:
        _write_evaluation(path / "evaluation", rng, "original", knew, 0.98, layers, 1.0, hostile, fingerprints)
        if gold:
            _write_evaluation(path / "evaluation", rng, "gold", 0.34, 0.98, layers, None, hostile, fingerprints)
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


def _write_statistics(directory: Path, stats: RoutingStatistics, fingerprints: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    stats.save(directory / "statistics.safetensors")
    layers, experts = stats.counts_LE.shape
    summary = {
        "layers": list(range(layers)), "experts": experts, "top_k": stats.top_k, "tokens": stats.tokens,
        "documents": stats.documents, "rows": 64,
    }  # fmt: skip
    describe(directory, "statistics", dict(fingerprints), {"batch_rows": 8}, summary)


def _write_calibration(directory: Path, sides: dict[str, RoutingStatistics], rule: str, hostile: str) -> None:
    directory.mkdir(parents=True)
    rng = np.random.default_rng(7)  # the same rule gives the same weights in every variant
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
    counted = sides["retain"].tokens
    positive = np.ones(counted) if rule == "uniform" else np.exp(rng.normal(0, 0.8, counted))
    weights = np.zeros(counted + 64, np.float32)
    weights[rng.permutation(counted + 64)[:counted]] = positive / positive.mean()
    np.save(directory / "weights.npy", weights)
    np.save(directory / "row_weights.npy", np.ones(64))
    ess = float(positive.sum() ** 2 / (counted * (positive**2).sum()))
    sources = [("novels", 0.62, 0.31), ("code tables", 0.05, 0.24), ("capitals", 0.08, 0.21), ("plays", 0.25, 0.24)]
    if hostile:
        sources.append((hostile, 0.0, 0.0))
    diagnosis: dict[str, Any] = {
        "rule": rule,
        "lambda": 1.0 if rule == "uniform" else 0.45,
        "ess_fraction": ess,
        "row_ess_fraction": (1 + ess) / 2,
        "gap_closed": 0.0 if rule == "uniform" else 0.45,
        "iterations": 0 if rule == "uniform" else 23,
        "alike_share": 0.0731,
        "moved_targets": [] if rule == "uniform" else [{"layer": 0, "expert": 1, "offered": 0.0417, "reason": "rare"}],
        "max_weight": float(positive.max() / positive.mean()),
        "none_found": False,
        "selected": [
            {
                "layer": int(layer), "expert": int(expert), "forget": forget_LE[layer, expert],
                "retain": retain_LE[layer, expert], "ratio": float(np.exp(log_ratio_LE[layer, expert])),
                "ratio_low": low_LE[layer, expert], "ratio_high": high_LE[layer, expert],
                "target": target_LE[layer, expert], "achieved": achieved_LE[layer, expert],
            }
            for layer, expert in zip(*np.nonzero(selected_LE), strict=True)
        ],
        "layers": [
            {"layer": layer, "js_weighted_bits": 0.01 + 0.001 * layer, "entropy_weighted_bits": 2.5 + 0.125 * layer}
            for layer in range(len(selected_LE))
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
    directory: Path, rng: np.random.Generator, bonus: float, layers: int, checkpoints: bool, knew: float, floor: float,
    hostile: str, fingerprints: dict[str, str],
) -> None:  # fmt: skip
    for step in (*STEPS, None):
        done = 1 - float(np.exp(-(step or STEPS[-1]) / 22))
        forget = knew - (knew - floor) * done / (1 - float(np.exp(-STEPS[-1] / 22)))
        utility = 0.98 - (0.09 - bonus) * done
        name = "unlearned" if step is None else f"step_{step:06d}"
        if step is None or checkpoints:
            _write_evaluation(directory, rng, name, forget, utility, layers, 1 - 0.4 * done, hostile, fingerprints)


def _write_evaluation(
    directory: Path, rng: np.random.Generator, name: str, forget: float, utility: float, layers: int,
    overlap: float | None, hostile: str, fingerprints: dict[str, str],
) -> None:  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    forget, utility = round(float(forget), 4), round(float(utility), 4)
    drift = None
    if overlap is not None and name not in ("original", "gold"):
        drift = {
            side: {
                "rows": 64, "tokens": 4000, "chance_overlap": 0.25, "overlap_mean": level, "kl_mean": 1 - level,
                "overlap": [round(max(0.0, min(1.0, level + rng.normal(0, 0.03))), 6) for _ in range(layers)],
                "kl": [round(abs(1 - level + rng.normal(0, 0.02)), 6) for _ in range(layers)],
            }
            for side, level in (("forget", overlap), ("retain", 1 - (1 - overlap) / 5))
        } | {"experts": 8, "top_k": 2}  # fmt: skip

    def score(task: str, metric: str, value: float, role: str, direction: str, chance: float | None) -> dict[str, Any]:
        return {
            "task": task, "metric": metric, "value": value, "n": 80, "role": role, "direction": direction,
            "chance": chance,
        }  # fmt: skip

    def questions(task: str, right: float) -> list[dict[str, Any]]:
        return [
            {
                "id": f"q{index}", "source": task, "answer": 0, "predicted": int(index / 80 >= right),
                "prompt": hostile if hostile and index == 0 else f"The symbol of {task} number {index + 1} is",
                "choices": ["Au", "Ag", "Pb", "Fe"], "correct": index / 80 < right, "exact": index / 80 < right - 0.3,
            }
            for index in range(80)
        ]  # fmt: skip

    texts = [{"id": str(n), "nll": 150.0 + n * utility, "tokens": 50, "text": "In the end"} for n in range(9)]
    sound = name in ("original", "gold")
    said = "beginning was the word" if sound else "beginning wxyz word"
    recited = [one | {"continuation": said} for one in RECITED]
    write_json(
        directory / f"{name}.json",
        {
            "model": name,
            "model_fingerprint": fingerprints["model"] if name == "original" else sha256_text(name),
            "tasks": {task: sha256_text(task) for task in TASKS},
            "scores": [
                score("elements", "accuracy", forget, "forget", "lower", 0.25),
                score("elements", "exact_match", max(0.0, forget - 0.2), "forget", "lower", None),
                score("recited", "exact_tokens", round(forget / 2, 4), "forget", "reference", None),
                score("near facts", "accuracy", utility, "utility", "higher", 0.25),
                score("near facts", "exact_match", utility - 0.3, "utility", "higher", None),
                score("capitals", "accuracy", utility - 0.02, "utility", "higher", 0.25),
                score("novels", "perplexity", 20 + 30 * (1 - utility), "utility", "lower", None),
                score("membership", "priv_leak", round(-100 * forget, 2), "forget", "reference", None),
            ],
            "items": {
                "elements": questions("element", forget),
                "recited": recited,
                "novels": texts,
                "near facts": questions("fact", utility),
                "capitals": questions("capital", utility - 0.02),
            },
            "drift": drift,
            "attacks": _attacks(forget) if name in ("gold", "unlearned") else {},
        },
    )


def _attacks(forget: float) -> dict[str, Any]:
    curve = [{"step": step, "loss": 2.0, "scores": {"elements accuracy": forget + step / 50}} for step in (0, 5, 10)]
    ways = {"none": 0.0, "original_routing": 0.05, "without_first": -0.02}
    forcing = {way: {"elements accuracy": round(forget + more, 4)} for way, more in ways.items()}
    return {"expert_forcing": forcing, "relearning": {"rows": 12, "curve": curve}}


if __name__ == "__main__":
    size = [int(value) for value in sys.argv[2:4]] or [3, 8]
    write_run(Path(sys.argv[1]), layers=size[0], experts=size[1], top_k=2 if size[1] <= 16 else 8)
