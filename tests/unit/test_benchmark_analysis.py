"""A study's arithmetic: which runs it has, matched forgetting, tuning without peeking, paired intervals."""

from __future__ import annotations

import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.headless_chromium import Chromium, find_chromium
from trace_ds.config.compose import recipe_names
from trace_ds.config.load import dump_yaml, load_config, validate
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.studies import analysis, runs
from trace_ds.studies.analysis import SAME, Comparison, Curve, matched
from trace_ds.studies.page import render_study

ALPHA, LR = "unlearning.alpha", "unlearning.optimizer.lr"
FORGET, KEPT = "bad accuracy", "good exact_match"
AT_HALF = partial(matched, target=0.5)


def config(**bench: Any) -> Config:
    raw: dict[str, Any] = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"forget": [{"path": "f.jsonl"}], "retain": [{"path": "r.jsonl"}]},
        "unlearning": {
            "alpha": 4.0,
            "zero_stage": 1,
            "optimizer": {"lr": 1e-3},
            "evaluate": {"every": 10, "tasks": ["bad", "good", "text"]},
        },
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
            "forget": FORGET,
            "utility": [KEPT],
            **bench,
        },
    }
    return validate(raw, "test")


def curve(
    seed: int, method: str, alpha: float, utilities: list[float], step: int | None, *, lr: float = 1e-3, **more: Any
) -> Curve:
    """Scored every ten steps from the original on; it has forgotten from ``step`` on."""
    steps = list(range(0, 10 * len(utilities) + 1, 10))
    forget = [0.0 if step is not None and at >= step else 1.0 for at in steps]
    scores = {FORGET: forget, KEPT: [utilities[0], *utilities]}
    return Curve(seed, method, f"alpha={alpha},lr={lr}", steps, scores, **more)


def test_a_study_has_every_combination_and_a_methods_own_grid_wins() -> None:
    study = config(
        methods={"uniform": {"calibration.rule": "uniform"}, "sampling": {ALPHA: 9.0}},
        grids={"sampling": {LR: [1e-3], ALPHA: [9.0, 18.0]}},
    )
    bench = study.bench
    assert bench is not None
    runs.check_study(study)
    trials = runs.trials_of(bench)
    assert len(trials) == len({trial.name for trial in trials}) == 4 + 2
    assert trials[0].name == "uniform-alpha1.0-lr0.001"
    assert runs.recipe_trial(study, "sampling").strength == {ALPHA: 9.0, LR: 1e-3}


def test_every_run_is_a_variant_with_the_changes_of_its_method_alone(tmp_path: Path) -> None:
    """The seed's own run is the baseline at the recipe's strength; the others take back what it changes."""
    recipe = tmp_path / "recipe.yaml"
    study = config(methods={"seuf": {"unlearning.seuf": {}, "calibration.rule": "uniform"}, "b": {}}, baseline="seuf")
    recipe.write_text(dump_yaml(study), encoding="utf-8")
    request = runs.seed_request([str(recipe)], [], tmp_path / "study", 3)
    assert request.config.unlearning.seuf is not None and request.config.seed == 3
    items = {item.config.name: item for item in request.run_and_variants()}
    assert len(items) == 8 and (request.config.unlearning.keep, request.config.bench) == (0, None)
    for trial in runs.trials_of(study.bench):  # type: ignore[arg-type]
        item = items.get(trial.name, request)
        settings = item.config.unlearning
        assert (settings.alpha, settings.optimizer.lr) == (trial.strength[ALPHA], trial.strength[LR])
        assert (settings.seuf is not None) == (item.config.calibration.rule == "uniform") == (trial.method == "seuf")
        assert runs.run_of(request, trial).path == item.run.path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {ALPHA: [1.0]}}, r"the grid for uniform lacks the recipe's own strength alpha=4.0"),
        ({"baseline": "none"}, r"the baseline 'none' is not among the methods uniform, sampling"),
        ({"grids": {"sampling": {"unlearning.steps": [5]}}}, r"grids.sampling has unlearning.steps, which grid lacks"),
        ({"forget": "bad acuracy"}, r"'bad acuracy' is not 'TASK METRIC' of a task of unlearning.evaluate.tasks"),
        ({"grid": {"data.add_bos": [True]}}, r"a study may not change data.add_bos"),
        ({"utility": ["text perplexity"]}, r"text perplexity does not grow with what is kept"),
        ({"forget": "text perplexity"}, r"perplexity does not fall as more is forgotten"),
        ({"forget": "bad exact_match"}, r"exact_match has no chance level, so there is no forgetting target"),
        ({"margin": 1.0}, r"bench.margin \(0.25 \+ 1\): bad accuracy is a number from 0 to 1, not 1.25. Fix: give one"),
        ({"methods": {"uniform": {}, "b": {"calibration.rul": "x"}}}, r"unknown key 'calibration.rul'"),
    ],
)
def test_a_study_that_cannot_be_run_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        runs.check_study(config(**changes))


@pytest.mark.parametrize("level", ["--target=1.25", "--target=-0.1", "--levels=0.5 1.25"])
def test_a_target_that_is_no_share_is_one_line(
    level: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import study_from_csv

    option, *values = level.replace("=", " ").split()
    monkeypatch.setattr("sys.argv", ["study_from_csv", "bench_entangled", "no.csv", option, *values])
    with pytest.raises(SystemExit) as ended:
        study_from_csv.main()
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert f"{option}: symbols accuracy is a number from 0 to 1, not {values[-1]}. Fix: give one (30 % is 0.3)" in line


def test_a_metric_may_be_restricted_to_sources() -> None:
    sources = {
        "near/a": {"n": 3, "exact_match": 1.0},
        "near/b": {"n": 1, "exact_match": 0.0},
        "mid": {"n": 6, "exact_match": 0.5},
    }
    scores = [
        {"task": "good", "metric": "exact_match", "value": 0.6},
        {"task": "t", "metric": "perplexity", "value": None},
    ]
    point = {"scores": scores, "by_source": {"good": sources}}
    assert analysis.metric_of(point, KEPT) == 0.6
    assert analysis.metric_of(point, "good exact_match near/*") == 0.75
    assert math.isnan(analysis.metric_of(point, "t perplexity"))
    by_source = {"t": {"a": {"n": 3, "perplexity": 2.0}, "b": {"n": 1, "perplexity": 32.0}}}
    assert analysis.metric_of({"scores": [], "by_source": by_source}, "t perplexity *") == pytest.approx(
        4.0
    )  # by token


def test_strengths_are_chosen_on_the_other_fold_only() -> None:
    # alpha 4 is best on seeds 0 and 2, alpha 1 on seeds 1 and 3: peeking would give every seed its own best
    curves = []
    for seed in range(4):
        for alpha in (1.0, 4.0):
            own_best = (alpha == 4.0) == (seed % 2 == 0)
            curves.append(curve(seed, "uniform", alpha, [0.9 if own_best else 0.3] * 2, 10))
    kinds = dict(Comparison(config(), curves, AT_HALF).choices())
    assert list(kinds) == [SAME, "own alpha"]  # of the learning rate there is one value: nothing to choose

    def alphas(kind: str) -> list[str]:
        return [result.settings["alpha"] for result in kinds[kind]["uniform"].values() if result is not None]

    assert alphas("own alpha") == ["1.0", "4.0", "1.0", "4.0"]
    assert set(alphas(SAME)) == {"4.0"}


def test_a_strength_that_forgets_on_more_seeds_is_chosen_before_a_better_one() -> None:
    curves = [curve(s, "uniform", 1.0, [0.2, 0.2], 20) for s in (1, 3)]
    curves += [curve(1, "uniform", 4.0, [0.9, 0.9], 10), curve(3, "uniform", 4.0, [0.9, 0.9], None)]
    curves += [curve(s, "uniform", 9.0, [math.nan, math.nan], 10) for s in (1, 3)]
    comparison = Comparison(config(), curves, AT_HALF)
    assert comparison.best_strength(curves, [1, 3]) == "alpha=1.0,lr=0.001"
    assert comparison.best_strength(curves[3:4], [3]) is None


def row_of(curves: list[Curve], at: str, method: str = "sampling") -> dict[str, Any]:
    rows = Comparison(config(), curves, AT_HALF).rows()
    return next(row for row in rows if (row["method"], row["strength"], row["at"]) == (method, SAME, at))


def test_pairs_are_of_the_same_seed() -> None:
    curves = [curve(0, "sampling", 4.0, [0.0, 0.6, 0.8], 20), curve(1, "sampling", 4.0, [0.9], None)]
    curves += [curve(0, "uniform", 4.0, [0.1, 0.5], 10), curve(1, "uniform", 4.0, [0.4], 10)]
    for at, expected in (("post", (0.7, 0.3)), ("end", (0.8, 0.5))):
        row = row_of(curves, at)
        assert (row["value"], row["baseline"]) == pytest.approx(expected)
        assert row["relative"] == pytest.approx(expected[0] / expected[1] - 1)
        assert row["seeds"] == [0]
        assert (row["steps"], row["baseline_steps"]) == ([20], [10])
        assert row["relative_interval"] is None
    assert row["strengths"]["0"] == "alpha=4.0,lr=0.001"


def test_a_seed_with_nothing_to_forget_is_named_and_left_out() -> None:
    """Its original model is at the target: there is no crossing, so no percent at one."""
    curves = [curve(0, method, 4.0, [0.6, 0.5], 0) for method in ("uniform", "sampling")]
    comparison = Comparison(config(), curves, AT_HALF)
    assert comparison.nothing_to_forget == [0]
    for row in comparison.rows():
        assert row["seeds"] == [] and row["value"] is row["relative"] is row["baseline"] is None


def test_diverged_runs_and_values_that_are_no_numbers_are_left_out() -> None:
    mine, base = curve(0, "sampling", 4.0, [0.9], 10), curve(0, "uniform", 4.0, [math.inf], 10)
    row = row_of([mine, base], "end")
    assert (row["seeds"], row["forget_end"]) == ([], [])
    diverged = curve(0, "sampling", 4.0, [0.9], 10, diverged=True)
    assert row_of([diverged, curve(0, "uniform", 4.0, [0.25], 10)], "post")["value"] is None
    assert analysis.ratio_interval([0.1, 0.2], [-1.0, -2.0]) is None  # no ratio to a baseline below zero


def test_intervals_agree_with_scipy() -> None:
    draw = np.random.default_rng(3)
    base = draw.uniform(0.4, 0.6, 6)
    mine = base + draw.normal(0.1, 0.05, 6)
    ours = analysis.t_interval(list(mine - base))
    theirs = stats.ttest_rel(mine, base).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    ratio = analysis.ratio_interval(list(mine), list(base))
    logs = stats.ttest_rel(np.log(mine), np.log(base)).confidence_interval(0.95)
    assert ratio is not None
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(logs.low) - 1, math.exp(logs.high) - 1))


@pytest.mark.parametrize("seeds", [4, 5, 16])
def test_intervals_of_a_ratio_cover_the_truth_as_often_as_they_say(seeds: int) -> None:
    """Simulated: utilities of .6 and .7 with the spread between base models and between runs that the studies show."""
    draw, covered, draws = np.random.default_rng(seeds), 0, 2000
    for _ in range(draws):
        level = draw.normal(0, 0.06, seeds)
        base = 0.6 * np.exp(level + draw.normal(0, 0.04, seeds))
        mine = 0.7 * np.exp(level + draw.normal(0, 0.04, seeds))
        interval = analysis.ratio_interval(list(mine), list(base))
        assert interval is not None
        covered += interval.low <= 0.7 / 0.6 - 1 <= interval.high
    assert covered / draws == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("name", [name for name in recipe_names("run") if name.startswith("bench_")])
def test_shipped_studies_can_be_run(name: str, tmp_path: Path) -> None:
    runs.check_study(load_config(name, [], "out")[0])
    assert len(runs.seed_request([name], [], tmp_path, 1).run_and_variants()) > 1


def test_utility_over_levels_is_read_off_the_lines_between_steps() -> None:
    from tools.study_from_csv import LEVELS, over_levels

    forget, utility = [0.8, 0.6, 0.3, 0.35, 0.2], [1.0, 0.9, 0.6, 0.4, 0.3]
    levels = np.linspace(0.35, 0.65, LEVELS)  # the first time that a level is reached counts
    expected = np.interp(levels, [0.3, 0.6, 0.8], [0.6, 0.9, 1.0]).mean()
    steps = [0, 3, 6, 9, 12]
    result = over_levels(steps, forget, utility, 0.35, 0.65)
    assert result.post == pytest.approx(expected) and (result.step, result.end) == (6, 0.3)
    assert over_levels(steps, forget, utility, 0.1, 0.65).step is None  # never that low
    assert over_levels(steps[2:], forget[2:], utility[2:], 0.35, 0.65).step is None  # lower when first looked at


def test_the_smallest_difference_that_is_told_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(5)
    differences = rng.normal(size=5)
    smallest = analysis.smallest_detectable(list(differences))
    assert smallest is not None
    draws_DN = rng.normal(smallest / differences.std(ddof=1), 1, (40_000, 5))
    assert (stats.ttest_1samp(draws_DN, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def published_study(name: str, target: float) -> dict[str, Any]:
    """study.json of a published study, as far as its curves tell it."""
    from tools.study_from_csv import read_curves

    studied, _ = load_config(f"bench_{name}", [], "out")
    curves = read_curves(studied, Path(__file__).parents[2] / f"docs/studies/{name}.csv")
    measure = partial(matched, target=target)
    return Comparison(studied, curves, measure).summary() | {"target": target, "references": {}, "made_with": [{}]}


@pytest.mark.parametrize(("name", "target"), [("entangled", 0.302), ("verbatim", 0.0653)])
def test_the_page_of_a_study_opens_with_its_verdict(name: str, target: float) -> None:
    """The numbers that are computed, of the first method where most seeds are compared; table, plot and words later."""
    result = published_study(name, target)
    text = render_study(result)
    mine = [r for r in result["comparisons"] if (r["method"], r["at"]) == ("sampling", "post")]
    row = next(r for r in mine[::-1] if len(r["seeds"]) == 5 and r["metric"] == mine[0]["metric"])
    differences = [a - b for a, b in zip(row["by_seed"], row["baseline_by_seed"], strict=True)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    outcome = {
        "entangled": "sampling is ahead of uniform: ",
        "verbatim": "No significant difference between sampling and ",
    }
    assert (interval.low > 0) == (name == "entangled")
    sentences = re.split(r"</h1>\s*<p class=\"verdict\">", text)[1].partition("</p>")[0]
    assert sentences.startswith(outcome[name]) and sentences.count(". ") == 1
    change = f"{np.mean(differences):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]".replace("-", "−")
    power = f"tell a difference of {row['detectable']:.3f} four times in five."
    for part in (f"{row['value']:.3f} against {row['baseline']:.3f}, {change}", "on 5 of 5 seeds", power):
        assert part in sentences
    places = [text.index(part) for part in (sentences, "<table>", "<svg", "What the words mean")]
    assert places == sorted(places) and "<script" not in text
    untuned = re.search(r'<th scope="row">weighting</th>.*?data-head="own alpha, lr">(.*?)</td>', text)
    assert untuned is not None and untuned[1] == "<small>not tuned</small>"


def test_a_study_on_which_nothing_can_be_compared_has_no_verdict() -> None:
    curves = [curve(s, "sampling", 4.0, [0.5, 0.5], 20 if s else None) for s in (0, 1)]
    curves += [curve(s, "uniform", 4.0, [0.4, 0.4], 20) for s in (0, 1)]
    result = Comparison(config(), curves, AT_HALF).summary() | {"target": 0.5, "references": {}, "made_with": [{}]}
    assert "No verdict: sampling and uniform both forgot on 1 of 2 seeds only." in render_study(result)


@pytest.mark.slow
@pytest.mark.skipif(
    find_chromium() is None and not os.environ.get("CI"), reason="no Chromium (apt-get install chromium)"
)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_study_is_whole(tmp_path: Path, width: int) -> None:
    (tmp_path / "study.html").write_text(render_study(published_study("entangled", 0.302)), encoding="utf-8")
    with Chromium(width, 900, phone=width < 500) as browser:
        browser.open(tmp_path / "study.html")
        assert browser.run("document.documentElement.scrollWidth") <= width and browser.messages == []
        outside = "[...document.querySelectorAll('table, td, svg, svg text, p')].filter((n) => {"
        outside += " const box = n.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; }).length"
        assert browser.run(outside) == 0 and browser.run("document.querySelectorAll('table, svg').length") > 3
