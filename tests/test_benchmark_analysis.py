"""A study's arithmetic: which runs it has, matched forgetting, tuning without peeking, paired intervals."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trace_ds.config.compose import recipe_names
from trace_ds.config.load import load_config, validate, with_changes
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.studies import analysis, run_list
from trace_ds.studies.analysis import Curve, choices
from trace_ds.studies.matched import matched
from trace_ds.studies.result_table import show

ALPHA, LR = "unlearning.alpha", "unlearning.optimizer.lr"
TRIAL = run_list.Trial("recipe", "sampling", (), 0)


def config(**bench: Any) -> Config:
    raw: dict[str, Any] = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"forget": [{"path": "f.jsonl"}], "retain": [{"path": "r.jsonl"}]},
        "unlearning": {"alpha": 4.0, "zero_stage": 1, "optimizer": {"lr": 1e-3}},
        "evaluation": {
            "tasks": [
                {"name": "bad", "type": "choice", "path": "q", "role": "forget"},
                {"name": "good", "type": "choice", "path": "q", "role": "utility"},
                {"name": "text", "type": "perplexity", "path": "t", "role": "utility"},
            ]
        },
        "bench": {
            "seeds": [0, 1, 2, 3],
            "methods": {"uniform": {"calibration.rule": "uniform"}, "sampling": {}},
            "grid": {ALPHA: [1.0, 4.0], LR: [1e-3, 2e-3]},
            "forget": "bad accuracy",
            "utility": ["good exact_match"],
            **bench,
        },
    }
    return validate(raw, "test")


def curve(seed: int, method: str, alpha: float, lr: float, utilities: list[float], step: int | None) -> Curve:
    steps = list(range(10, 10 * len(utilities) + 1, 10))
    forget = [0.0 if step is not None and at >= step else 1.0 for at in steps]
    found = {"good exact_match": matched(steps, forget, utilities, 0.5)}
    return Curve(seed, "recipe", method, ((ALPHA, alpha), (LR, lr)), found, False)


def test_a_study_has_every_combination_and_the_narrowest_grid_wins() -> None:
    made = config(
        losses={"rmu": {}, "graddiff": {"unlearning.forget_loss": "graddiff", ALPHA: 9.0}},
        grids={"graddiff": {ALPHA: [9.0]}, "sampling": {LR: [1e-3]}, "graddiff sampling": {ALPHA: [9.0, 18.0]}},
    )
    bench = made.bench
    assert bench is not None
    run_list.check(made)
    trials = run_list.grid_trials(bench, bench.seeds)
    assert len(trials) == len(set(trials)) == 4 * ((4 + 2) + (2 + 2))
    assert trials[0].name == "rmu/uniform/alpha=1.0,lr=0.001"
    assert run_list.recipe_point(made, "graddiff", "sampling") == ((ALPHA, 9.0), (LR, 1e-3))
    last = next(t for t in trials if t.loss == "graddiff" and dict(t.point)[ALPHA] == 18.0)
    asked = run_list.trial_config(made, last)
    assert (asked.unlearning.forget_loss, asked.unlearning.alpha, asked.bench) == ("graddiff", 18.0, None)
    looks = asked.unlearning.evaluate
    assert (looks.every, looks.tasks) == (10, ["bad", "good", "text"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {ALPHA: [1.0]}}, r"the grid of unlearning.alpha for recipe uniform lacks the recipe's own value 4.0"),
        ({"baseline": "none"}, r"the baseline 'none' is not among the methods uniform, sampling"),
        ({"grids": {"raking": {ALPHA: [4.0]}}}, r"grids names 'raking', which is no method"),
        ({"grids": {"sampling": {"unlearning.steps": [5]}}}, r"grids.sampling has unlearning.steps, which grid lacks"),
        ({"forget": "bad acuracy"}, r"'bad acuracy' is not 'TASK METRIC' of a task of the recipe"),
        ({"utility": ["good exact_match", "good exact_mach near/*"]}, r"use one of: bad accuracy, accuracy_norm"),
        ({"score_at_end": ["godo"]}, r"score_at_end: 'godo' is no task of the recipe"),
        ({"score_at_end": ["good"]}, r"score_at_end: 'good' is scored at every look: it decides"),
        ({"grid": {"data.add_bos": [True]}}, r"a study may not change data.add_bos"),
        ({"forget": "worse accuracy"}, r"'worse accuracy' is not 'TASK METRIC' of a task of the recipe"),
        (
            {"forget": "bad accuracy near/*", "until": 0.3},
            r"a run cannot end by 'bad accuracy near/\*', which is of some",
        ),
        ({"utility": ["text perplexity"]}, r"text perplexity does not grow with what is kept"),
        ({"seeds": [1, 1]}, r"seeds holds one number twice"),
        ({"screening": [7, 3]}, r"seed 3 is among screening and seeds"),
        ({"methods": {"uniform": {}, "b": {"calibration.rul": "x"}}}, r"unknown key 'calibration.rul'"),
    ],
)
def test_a_study_that_cannot_be_run_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_list.check(config(**changes))


def test_runs_do_not_end_before_they_have_forgotten() -> None:
    pretrained, _ = load_config("bench_pretrained", [], "out")
    with pytest.raises(UserError, match=r"runs end at 0.5, and have forgotten at 0.45 .chance plus bench.margin"):
        run_list.check(with_changes(pretrained, {"bench.margin": 0.2}, "test"))


def test_a_task_that_costs_more_than_the_training_is_refused(tmp_path: Path) -> None:
    """Ten times what is trained between two looks: 16 rows of 256 tokens, three passes, ten steps."""
    path, limit_bytes = tmp_path / "text.txt", 10 * 4 * 3 * 16 * 256 * 10
    changes: dict[str, Any] = {"evaluation.tasks": config().model_dump(mode="json")["evaluation"]["tasks"]}
    changes["evaluation.tasks"][2]["path"] = str(path)
    asked = with_changes(config(), changes | {"data.context_length": 256}, "test")
    path.write_bytes(b"x" * limit_bytes)
    run_list.check(asked)
    path.write_bytes(b"x" * (2 * limit_bytes))
    with pytest.raises(UserError, match=r"task text is too dear .* every 10 steps: about 2,457,600 tokens, 20 times"):
        run_list.check(asked)
    run_list.check(with_changes(asked, {"bench.score_at_end": ["text"]}, "test"))


def test_a_metric_may_be_restricted_to_sources() -> None:
    sources = {
        "near/a": {"n": 3, "exact_match": 1.0},
        "near/b": {"n": 1, "exact_match": 0.0},
        "mid": {"n": 6, "exact_match": 0.5},
    }
    entry = {"scores": {"good exact_match": 0.6, "t perplexity": None}, "by_source": {"good": sources}}
    assert analysis.metric_of(entry, "good exact_match") == 0.6
    assert analysis.metric_of(entry, "good exact_match near/*") == 0.75
    assert analysis.questions_of(entry, "good exact_match") == 10
    assert analysis.questions_of(entry, "good exact_match near/*") == 4
    assert analysis.questions_of(entry, "t perplexity") is analysis.questions_of(entry, "good far/*") is None
    assert math.isnan(analysis.metric_of(entry, "t perplexity"))
    assert math.isnan(analysis.metric_of(entry, "good exact_match far/*"))
    text = {"a": {"n": 3, "perplexity": 2.0}, "b": {"n": 1, "perplexity": 32.0}, "c": {"n": 9}}
    entry = {"scores": {}, "by_source": {"t": text}}
    assert analysis.metric_of(entry, "t perplexity [ab]") == pytest.approx(4.0)  # (2·2·2·32) ** 1/4
    assert math.isnan(analysis.metric_of(entry, "t perplexity *"))  # c's is infinite


def test_strengths_are_chosen_on_the_other_fold_only() -> None:
    # alpha 4 is best on seeds 0 and 2, alpha 1 on seeds 1 and 3: peeking would give every seed its own best
    curves = []
    for seed in range(4):
        for alpha in (1.0, 4.0):
            own_best = (alpha == 4.0) == (seed % 2 == 0)
            curves.append(curve(seed, "uniform", alpha, 1e-3, [0.9 if own_best else 0.3] * 2, 10))
    found = analysis.tuned(curves, [0, 1, 2, 3], "good exact_match", [ALPHA], {LR: 1e-3})
    assert [dict(found[seed].point)[ALPHA] for seed in range(4)] == [1.0, 4.0, 1.0, 4.0]  # type: ignore[union-attr]
    fixed = analysis.tuned(curves, [0, 1, 2, 3], "good exact_match", [], {ALPHA: 4.0, LR: 1e-3})
    assert {dict(c.point)[ALPHA] for c in fixed.values() if c is not None} == {4.0}


def test_a_screening_chooses_and_other_seeds_are_told() -> None:
    asked = config(screening=[7, 8], seeds=[0, 1])
    bench = asked.bench
    assert bench is not None
    # on the screening's seeds alpha 1 is best at 1e-3 and (4, 2e-3) of all; on the others alpha 4 would be
    utilities = {(1.0, 1e-3): 0.6, (4.0, 1e-3): 0.5, (1.0, 2e-3): 0.4, (4.0, 2e-3): 0.7}
    screened = [
        curve(trial.seed, trial.method, *(value for _, value in trial.point), [utility] * 2, 10)
        for trial in run_list.grid_trials(bench, [7, 8])
        for utility in [utilities[tuple(value for _, value in trial.point)]]
    ]
    points = analysis.chosen_points(asked, screened)
    wanted = [(4.0, 1e-3), (1.0, 1e-3), (4.0, 2e-3)]  # the recipe's own, own alpha, own alpha and learning rate
    assert [tuple(value for _, value in point) for point in points["recipe", "uniform"]] == wanted
    trials = run_list.trials_at(bench, points)
    assert len(trials) == 2 * 2 * 3 and {trial.seed for trial in trials} == {0, 1}
    told = [
        curve(t.seed, t.method, *(value for _, value in t.point), [0.9 if dict(t.point)[ALPHA] == 4.0 else 0.1], 10)
        for t in trials
    ]
    for (_, kind, _, chosen), point in zip(choices(asked, [*screened, *told]), wanted, strict=True):
        for method in bench.methods:
            found = {seed: tuple(v for _, v in c.point) for seed, c in chosen[method].items() if c is not None}
            assert found == dict.fromkeys([0, 1], point), kind


def test_a_chosen_value_at_an_end_of_what_was_tried_is_told() -> None:
    bench = config(grid={ALPHA: [1.0, 4.0, 16.0], LR: [1e-3]}).bench
    assert bench is not None

    def told(alpha: float, *free: str) -> list[str]:
        return run_list.edges(bench, "recipe", "uniform", ((ALPHA, alpha), (LR, 1e-3)), free)

    assert told(1.0, ALPHA, LR) == ["alpha=1.0"] and told(16.0, ALPHA) == ["alpha=16.0"]  # of one value there is no end
    assert told(4.0, ALPHA, LR) == told(1.0, LR) == told(1.0) == []
    assert run_list.edges(bench, "recipe", "uniform", None, [ALPHA]) == []


def test_a_point_that_forgets_on_more_seeds_is_chosen_before_a_better_one() -> None:
    curves = [curve(s, "uniform", 1.0, 1e-3, [0.2, 0.2], 20) for s in (1, 3)]
    curves += [curve(1, "uniform", 4.0, 1e-3, [0.9, 0.9], 10), curve(3, "uniform", 4.0, 1e-3, [0.9, 0.9], None)]
    assert dict(analysis.choose_point(curves, [1, 3], "good exact_match") or ())[ALPHA] == 1.0
    never = [curve(1, "uniform", 4.0, 1e-3, [0.9], None)]
    assert analysis.choose_point(never, [1], "good exact_match") is None
    unknown = [curve(s, "uniform", 9.0, 1e-3, [math.nan, math.nan], 10) for s in (1, 3)]
    assert dict(analysis.choose_point([*unknown, *curves], [1, 3], "good exact_match") or ())[ALPHA] == 1.0


def test_pairs_are_of_the_same_seed_and_missing_ones_are_named() -> None:
    mine = {0: curve(0, "sampling", 4.0, 1e-3, [0.0, 0.6, 0.8], 20), 1: curve(1, "sampling", 4.0, 1e-3, [0.9], None)}
    base = {0: curve(0, "uniform", 1.0, 1e-3, [0.1, 0.5], 10), 1: curve(1, "uniform", 1.0, 1e-3, [0.4], 10)}
    for value, expected in (("post", (0.7, 0.3)), ("cross", (0.3, 0.1)), ("end", (0.8, 0.5))):
        row = analysis.compare(mine, base, "good exact_match", value)
        assert (row["value"], row["baseline"]) == pytest.approx(expected)
        assert row["relative"] == pytest.approx(expected[0] / expected[1] - 1)
        assert row["seeds"] == [0] and row["not_reached"] == {"method": [1], "baseline": []}
        assert (row["steps"], row["baseline_steps"], row["steps_between_scores"]) == ([20], [10], 10)
        assert row["relative_interval"] is None
    assert row["points"]["0"] == "alpha=4.0,lr=0.001"


def test_what_cannot_be_compared_is_said_not_dropped() -> None:
    forgets = [{"step": 10, "forget": 0.1}, {"step": 20, "forget": 0.4}]
    entries = [
        {"step": e["step"], "scores": {"bad accuracy": e["forget"], "good exact_match": 0.5}, "by_source": {}}
        for e in forgets
    ]
    result = {"curve": entries, "diverged": None}
    back = analysis.curve_of(TRIAL, result, "bad accuracy", ["good exact_match"], 0.2)
    assert (back.step, back.forget_end) == (10, 0.4)  # above the target again
    base = curve(0, "uniform", 1.0, 1e-3, [math.inf], 10)
    row = analysis.compare({0: back}, {0: base}, "good exact_match", "end")
    assert (row["seeds"], row["not_a_number"], row["forget_end"]) == ([], [0], [])
    base = curve(0, "uniform", 1.0, 1e-3, [0.25], 10)
    row = analysis.compare({0: back}, {0: base}, "good exact_match", "end")
    assert (row["relative"], row["forget_end"], row["baseline_forget_end"]) == (1.0, [0.4], [None])
    assert analysis.bootstrap_ratio([0.1, 0.2], [-1.0, -2.0]) is None  # no ratio to a baseline below zero


def test_a_method_with_one_value_is_not_called_tuned() -> None:
    bench = config(grids={"sampling": {LR: [1e-3]}}).bench
    assert bench is not None
    assert run_list.untried(bench, "recipe", "sampling", [ALPHA, LR]) == ["lr"]
    assert (
        run_list.untried(bench, "recipe", "sampling", [ALPHA])
        == run_list.untried(bench, "recipe", "uniform", [LR])
        == []
    )


@pytest.mark.parametrize(
    ("grid", "kinds"),
    [
        ({ALPHA: [4.0], LR: [1e-3]}, ["same strength"]),
        ({ALPHA: [4.0], LR: [1e-3, 2e-3]}, ["same strength", "own alpha, lr"]),
        ({ALPHA: [1.0, 4.0], LR: [1e-3]}, ["same strength", "own alpha"]),
    ],
)
def test_what_cannot_be_tuned_is_not_told_twice(grid: dict[str, list[float]], kinds: list[str]) -> None:
    asked = config(grid=grid)
    assert asked.bench is not None
    curves = [
        curve(seed, method, alpha, lr, [0.5], 10)
        for seed in asked.bench.seeds
        for method in asked.bench.methods
        for alpha in grid[ALPHA]
        for lr in grid[LR]
    ]
    assert [kind for _, kind, _, _ in choices(asked, curves)] == kinds


def test_intervals_agree_with_scipy() -> None:
    draw = np.random.default_rng(3)
    base = draw.uniform(0.4, 0.6, 6)
    mine = base + draw.normal(0.1, 0.05, 6)
    ours = analysis.t_interval(list(mine - base))
    theirs = stats.ttest_rel(mine, base).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis) / b.mean(axis) - 1

    reference = stats.bootstrap(
        (mine, base), ratio, paired=True, method="percentile", n_resamples=40_000, rng=np.random.default_rng(1)
    ).confidence_interval
    found = analysis.bootstrap_ratio(list(mine), list(base))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.004)
    assert found == analysis.bootstrap_ratio(list(mine), list(base))


def test_a_diverged_run_is_never_compared(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"scores": {"bad accuracy": 0.1, "good exact_match": 0.9}, "by_source": {}}
    result: dict[str, Any] = {"curve": [{"step": 10, **entry}]}
    names = ("bad accuracy", ["good exact_match"], 0.5)
    assert analysis.curve_of(TRIAL, result | {"diverged": None}, *names).step == 10
    diverged = analysis.curve_of(TRIAL, result | {"diverged": 12}, *names)
    assert diverged.diverged and diverged.step is None
    base = {0: analysis.curve_of(TRIAL, result | {"diverged": None}, *names)}
    rows = [
        {"loss": "recipe", "strength": "same strength", "method": "sampling", "metric": "good exact_match", "at": at}
        | analysis.compare({0: diverged}, base, "good exact_match", at)
        for at in ("post", "cross", "end")
    ]
    result = {"recipe": "x", "comparisons": rows, "seeds": [0], "baseline": "uniform", "forget": "bad accuracy"}
    show(result | {"never_reached": [], "diverged": ["seed 0, sampling"]})
    shown = capsys.readouterr().out
    assert "never" in shown and "diverged: 1 runs" in shown


@pytest.mark.parametrize("name", [name for name in recipe_names("run") if name.startswith("bench_")])
def test_shipped_studies_can_be_run(name: str) -> None:
    made, _ = load_config(name, [], "out")
    if made.bench is not None:
        run_list.check(made)
        trials = run_list.grid_trials(made.bench, [0])
        assert len({trial.name for trial in trials}) == len(trials)


def test_utility_over_levels_is_read_off_the_lines_between_steps() -> None:
    from tools.study_from_csv import LEVELS, over_levels

    forget, utility = [0.8, 0.6, 0.3, 0.35, 0.2], [1.0, 0.9, 0.6, 0.4, 0.3]
    levels = np.linspace(0.35, 0.65, LEVELS)  # the first time that a level is reached counts
    wanted = np.interp(levels, [0.3, 0.6, 0.8], [0.6, 0.9, 1.0]).mean()
    steps = [0, 3, 6, 9, 12]
    found = over_levels(steps, forget, utility, 0.35, 0.65)
    assert found.post == pytest.approx(wanted) and (found.step, found.spacing, found.end) == (6, 3, 0.3)
    assert found.at_crossing == matched(steps, forget, utility, 0.35).at_crossing
    assert over_levels(steps, forget, utility, 0.1, 0.65).step is None  # never that low
    assert over_levels(steps[2:], forget[2:], utility[2:], 0.35, 0.65).step is None  # lower when first looked at


def test_a_run_that_ended_above_its_end_diverged(tmp_path: Path) -> None:
    from tools.study_from_csv import read_curves

    path = tmp_path / "frontier.csv"
    lines = [
        "seed,loss,method,point,step,symbols choice_probability,kept_facts choice_probability,kept_facts accuracy,"
    ]
    lines[0] += "kept_facts choice_probability near/*element*,general_text perplexity"
    ends = {1: 0.55, 2: 0.45}
    lines += [
        f"{s},recipe,uniform,alpha=16,{t},{f},.8,.8,.8," for s, end in ends.items() for t, f in ((3, 0.7), (6, end))
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    pretrained, _ = load_config("bench_pretrained", [], "out")
    found = read_curves(pretrained, path, partial(matched, target=0.6))
    assert {curve.seed: curve.diverged for curve in found} == {1: True, 2: False}


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_the_smallest_difference_that_is_told_is_found_four_times_in_five(seeds: int) -> None:
    from tools.study_from_csv import detectable

    rng = np.random.default_rng(seeds)
    differences = rng.normal(size=seeds)
    found = detectable({"by_seed": list(0.5 + differences), "baseline_by_seed": [0.5] * seeds})
    assert found is not None
    draws_DN = rng.normal(found / differences.std(ddof=1), 1, (40_000, seeds))
    shares = (stats.ttest_1samp(draws_DN, 0, axis=1).pvalue < 0.05).mean()
    assert shares == pytest.approx(0.8, abs=0.01)
