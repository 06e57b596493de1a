"""The metrics: what each means in one line (the report shows it), chance, and which way is good; pure.

The first metric of a kind of task is its headline.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from trace_ds.errors import UserError

ARROWS = {"lower": "↓", "higher": "↑", "reference": "→"}  # →: nearest to the reference is best
DRIFT_ROWS = 256  # of each corpus, whose routing before and after is compared
CHOICE_CHANCE, ASSUMED_AUC = 0.25, 0.5
PRIV_LEAK, MIN_K_AUC = "priv_leak", "auc_min_k"
FORGET_QUALITY, MODEL_UTILITY = "forget_quality", "model_utility"


class Metric(NamedTuple):
    """``meaning`` gives range, chance, and what to compare it with. ``shows``: more of it means that more is known, or
    less, or neither: then the value nearest to a reference is best."""

    meaning: str
    chance: float | None = None
    shows: Literal["knowledge", "surprise", "reference"] = "knowledge"


METRICS = {
    "accuracy": Metric(
        "share of questions whose right choice has the largest log-probability; 0 … 1, chance 0.25", CHOICE_CHANCE
    ),
    "accuracy_norm": Metric("the same per character of the choice; 0 … 1, chance 0.25", CHOICE_CHANCE),
    "exact_match": Metric("share of questions answered word for word by greedy decoding; 0 … 1, chance 0"),
    "choice_probability": Metric(
        "mean probability of the right choice among the choices; 0 … 1, chance 0.25", CHOICE_CHANCE
    ),
    "acc": Metric("lm-eval's accuracy, zero-shot by letter; 0 … 1, chance 0.25", CHOICE_CHANCE),
    "acc_norm": Metric("lm-eval's accuracy per character of the choice; 0 … 1, chance 0.25", CHOICE_CHANCE),
    "rouge_l": Metric(
        "ROUGE-L F1 of the greedy text against the true one; 0 … 1, compare with a model that never saw it"
    ),
    "exact_tokens": Metric("share of tokens of the true continuation that greedy decoding gives; 0 … 1"),
    "token_probability": Metric(
        "mean probability of the tokens of the true continuation, each after the true ones before it; 0 … 1, compare "
        "with a model that never saw it"
    ),
    "perplexity": Metric(
        "exp of the mean loss per token; 1 … ∞, lower is better on text to keep, compare with the original",
        shows="surprise",
    ),
    "probability": Metric(
        "TOFU: mean probability of the answer, per token; 0 … 1, compare with a model that never saw it"
    ),
    "rouge_l_recall": Metric(
        "TOFU: ROUGE-L recall of the greedy answer; 0 … 1, compare with a model that never saw it"
    ),
    "truth": Metric("TOFU: mean of max(0, 1 − truth ratio); 0 … 1, 0 when false answers are as likely as the true one"),
    FORGET_QUALITY: Metric(
        "TOFU: p-value that truth ratios are those of the retrained model; 0 … 1, above 0.05 is forgotten",
        shows="surprise",
    ),
    MODEL_UTILITY: Metric("TOFU: harmonic mean of probability, ROUGE-L recall and truth over all utility tasks; 0 … 1"),
    PRIV_LEAK: Metric(
        "MUSE's PrivLeak, %: −100 not unlearned, above 0 over-unlearned; 0, the retrained model, is best",
        shows="reference",
    ),
    MIN_K_AUC: Metric(
        "Min-40 % attack, AUC of forget against unseen text; 0 … 1, chance 0.5, best: the retrained's",
        ASSUMED_AUC,
        "reference",
    ),
}
TASK_METRICS = {
    "choice": ("accuracy", "accuracy_norm", "exact_match", "choice_probability"),
    "verbatim": ("rouge_l", "exact_tokens", "token_probability"),
    "perplexity": ("perplexity",),
    "knowmem": ("rouge_l",),
    "membership": (PRIV_LEAK, MIN_K_AUC),
    "tofu": ("probability", "rouge_l_recall", "truth", FORGET_QUALITY, MODEL_UTILITY),
    "lm_eval": ("acc", "acc_norm"),
}
ROLE_OF = {FORGET_QUALITY: "forget", MODEL_UTILITY: "utility"}  # metrics of tasks of one role only
OTHER_RANGE = ("perplexity", PRIV_LEAK, "forget_nll", "retain_nll")


def meaning(metric: str) -> str | None:
    """One line on a metric of a result; None for one that is not ours."""
    attacked = metric.removeprefix("relearned_")
    if attacked != metric and attacked in METRICS:
        return f"{attacked} after a few steps of fine-tuning on a share of the forget text"
    return METRICS[metric].meaning if metric in METRICS else None


def require_level(score: str, level: float, where: str) -> None:
    """Refuse a level outside the range 0 … 1 of ``score`` ('TASK METRIC …', or one of fixed rows), as 30 for 30 %.

    Perplexities, losses and PrivLeak have another range and pass.
    """
    if score.split()[:2][-1] not in OTHER_RANGE and not 0 <= level <= 1:
        raise UserError(f"{score} is a number from 0 to 1, not {level:g}", where, "give one (30 % is 0.3)")


def direction(metric: str, role: str) -> str:
    """Which way is good: ``lower``, ``higher``, or ``reference`` (nearest to the score's ``reference`` is best).

    A forget task wants little knowledge left, a utility task the opposite.
    """
    shows = METRICS[metric].shows
    return shows if shows == "reference" else "higher" if (shows == "knowledge") == (role == "utility") else "lower"


def distinct_scores(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One score per (task, metric), forget tasks first, else in the order of their first appearance."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for score in result["scores"]:
            first.setdefault((score["task"], score["metric"]), score)
    return sorted(first.values(), key=lambda score: score["role"] != "forget")


def score_changes(results: list[dict[str, Any]], before: str, after: str) -> str:
    """The first score of each task for two of the models, ``TASK before → after``, in one line."""
    named = {result["model"]: result for result in results}
    first = {score["task"]: score["metric"] for score in reversed(distinct_scores(results))}
    changes = [
        f"{task} {' → '.join(_text(_value(named[name], task, first[task])) for name in (before, after))}"
        for task in dict.fromkeys(score["task"] for score in distinct_scores(results))
        if before in named and after in named
    ]
    return ", ".join(changes)


def _value(result: dict[str, Any], task: str, metric: str) -> float | None:
    for score in result["scores"]:
        if (score["task"], score["metric"]) == (task, metric):
            return score["value"]
    return None


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"
