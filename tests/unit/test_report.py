"""The report of a run: what it writes, what it says, and that it says nothing that is not so."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from tests.fake_run import HOSTILE, STEPS, write_run
from trace_ds.conversion.card import plain_markdown
from trace_ds.errors import UserError
from trace_ds.reporting import page, scores, tables
from trace_ds.reporting.gather import Arm, Evaluation, RunData, Score, gather
from trace_ds.reporting.verdict import verdict
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.report import model_card_of, report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("report") / "run")
    report(RunDirectory.at(path))
    return path


def render(path: Path) -> str:
    data = gather(path)
    return page.render_page(data, verdict(data), tables.all_tables(data))


def card_of(path: Path) -> str:
    data = gather(path)
    return model_card_of(data, verdict(data))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


def test_what_is_written(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    names = ("routing", "selected", "sources", "documents", "curves", "matched", "drift")
    tables = {f"{name}.csv" for name in (*names, "scores", "items")}
    assert before.keys() == {"index.html", "model_card.md", "artefact.json", *tables}
    linked = set(re.findall(r'href="([^"#:]+)"', before["index.html"].decode()))
    assert linked == tables
    report(RunDirectory.at(run))
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before
    records = rows_of(run / "report" / "scores.csv")
    assert {entry["model"] for entry in records} == {"original", "gold", "unlearned", "uniform", "loss_weighting"}
    source = json.loads((run / "variants" / "uniform" / "evaluation" / "unlearned.json").read_text())
    expected = {(s["task"], s["metric"]): pytest.approx(s["value"], rel=1e-5) for s in source["scores"]}
    assert {(e["task"], e["metric"]): float(e["value"]) for e in records if e["model"] == "uniform"} == expected


def test_routing_table_equals_the_statistics(run: Path) -> None:
    data = gather(run)
    assert data.forget is not None and data.retain is not None and data.calibration is not None
    rows = rows_of(run / "report" / "routing.csv")
    shape = data.forget.counts_LE.shape
    for side, stats in (("forget", data.forget), ("retain", data.retain)):
        counts = np.array([int(row[f"{side}_count"]) for row in rows]).reshape(shape)
        assert (counts == stats.counts_LE).all()
        errors = np.array([float(row[f"{side}_error"]) for row in rows]).reshape(shape)
        np.testing.assert_allclose(errors, np.sqrt(stats.variance_LE()), rtol=1e-5)
    arrays = data.calibration.arrays
    for end in ("low", "high"):
        bound = np.array([float(row[f"log_ratio_{end}"]) for row in rows]).reshape(shape)
        np.testing.assert_allclose(np.exp(bound), arrays[f"ratio_{end}_LE"], rtol=1e-4)
    chosen = {(row["layer"], row["expert"]): row for row in rows}
    for row in rows_of(run / "report" / "selected.csv"):
        mine = chosen[row["layer"], row["expert"]]
        for end in ("low", "high"):
            assert np.exp(float(mine[f"log_ratio_{end}"])) == pytest.approx(float(row[f"ratio_{end}"]), rel=1e-4)
    assert [int(row["selected"]) for row in rows] == arrays["selected_LE"].ravel().tolist()


def test_curves_and_matched_forgetting(run: Path) -> None:
    curves = rows_of(run / "report" / "curves.csv")
    own = [row for row in curves if row["arm"] == "unlearned"]
    assert [int(row["step"]) for row in own] == [0, *STEPS]
    assert own[0]["model"] == "original" and float(own[0]["forget"]) == 0.97
    for row in rows_of(run / "report" / "matched.csv"):
        mine = [point for point in curves if point["arm"] == row["arm"]]
        points = [(int(p["step"]), float(p["forget"]), float(p["utility"])) for p in mine]
        first = next(index for index, point in enumerate(points) if point[1] <= 0.34)
        after = [utility for _, _, utility in points[first:]]
        assert float(row["mean_utility_after"]) == pytest.approx(sum(after) / len(after), rel=1e-5)
        assert (float(row["first_step"]), float(row["utility_at_first"])) == (points[first][0], points[first][2])
        assert int(row["steps_between_scores"]) == 20


def test_tasks_that_a_job_did_not_score_on_its_way_are_not_compared(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    for place in (path, path / "variants" / "uniform"):
        curve = json.loads((place / "curve.json").read_text())
        for point in curve["curve"]:
            point["scores"] = [s for s in point["scores"] if s["task"] in ("elements", "near facts")]
        (place / "curve.json").write_text(json.dumps(curve))
    data = gather(path)
    part = scores.standing(data, "unlearned", "uniform")
    assert part is not None and part.tasks == ("near facts",)
    after = part.against["after"]
    assert after is not None and after.interval is not None
    variance = (after.mine * (1 - after.mine) + after.base * (1 - after.base)) / 80  # as of different questions
    assert after.interval.high - after.value == pytest.approx(1.96 * np.sqrt(variance), rel=1e-3)
    assert "By the tasks that were scored on the way: near facts." in " ".join(verdict(data).lines)


def test_the_difference_to_uniform_weights_is_paired_by_question(run: Path) -> None:
    data = gather(run)
    finals = {arm.label: arm.final for arm in data.arms if arm.final is not None}
    mine, base = (
        np.array([item["exact"] for item in finals[name].items["near facts"]], float)
        for name in ("unlearned", "uniform")
    )
    differences, error = mine - base, (mine - base).std(ddof=1) / np.sqrt(80)
    score = {(r["model"], r["metric"]): r for r in rows_of(run / "report" / "scores.csv") if r["task"] == "near facts"}
    result = score["unlearned", "exact_match"]
    assert float(result["gain_low"]) == pytest.approx(differences.mean() - 1.96 * error, abs=1e-4)
    assert float(result["gain_high"]) == pytest.approx(differences.mean() + 1.96 * error, abs=1e-4)
    assert score["uniform", "exact_match"]["gain"] == ""
    assert float(result["gain_low"]) > 0


def test_the_verdict_answers_in_words(run: Path) -> None:
    summary = verdict(gather(run))
    row = headline_of(run)
    after, low = (float(row[f"mean_utility_after_gain{end}"]) for end in ("", "_low"))
    assert f"it keeps {after:.3f} more utility on average once it has forgotten [{low:.3f}, " in summary.sentence
    assert summary.sentence.startswith("TRACE forgot what it should and kept a utility of ")
    assert " (0.970 before); against uniform weights" in summary.sentence
    requested = {each.question: each for each in summary.answers}
    forgot, cost = requested["Did it forget?"], requested["What did it cost?"]
    assert forgot.answer == "Yes" and forgot.details == (
        "elements (accuracy): 0.300 [0.211, 0.408] after, 0.970 before; forgotten is at most 0.340, what a model "
        "scores that never saw the text.",
    )
    assert cost.answer.endswith(" of utility")
    assert any(line.startswith("Fluency (perplexity of novels") for line in cost.details)
    first = requested["Is TRACE better than uniform weights?"].details[1]
    assert first.startswith(
        "At the first scored step that had forgotten (60 against 60; 20 steps after the score before"
    )
    assert "moment of forgetting" not in " ".join(summary.lines)  # nobody scored the model there
    assert "One seed is no proof" in " ".join(summary.lines)


def test_one_scale_and_the_configurations_names(run: Path) -> None:
    """The headline, the tables and the card give scores in 0 … 1, and no model of several is just "unlearned"."""
    text = (run / "report" / "index.html").read_text("utf-8").partition('<script type="application/json"')[0]
    shown = re.sub(r"<style>.*?</style>|<pre.*?</pre>", "", text, flags=re.DOTALL)
    assert not re.search(r"\bpoints\b|of 100\b", shown)
    row = headline_of(run)
    for key in ("utility_at_first", "mean_utility_after", "utility_at_end"):
        assert f"{float(row[key]):.3f}" in shown
    for label in ("fake (TRACE)", "loss_weighting (TRACE)", "uniform"):
        assert f'<th scope="col" class="num">{label}</th>' in shown
    assert not re.search(r">\s*unlearned\b", shown + card_of(run))
    console = Console(width=200, file=io.StringIO())
    console.print(scores.summary_table(gather(run)))
    assert "fake (TRACE)" in console.file.getvalue() and "unlearned" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_words_of_the_page_are_explained_at_its_foot(run: Path) -> None:
    text = (run / "report" / "index.html").read_text("utf-8")
    glossary = re.search(r'<section id="words">(.*?)</section>', text, re.DOTALL)
    assert glossary is not None and 'href="#words"' in text
    explained = re.findall(r"<dt [^>]*>(.+?)</dt><dd>(.{20,}?)</dd>", glossary[1])
    used = {"gold", "raking", "tempering λ", "effective sample size", "forget score", "utility", "uniform", "TRACE"}
    assert used <= {word for word, _ in explained}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gain": -0.1}, ["less utility on average once it has forgotten ["]),
        ({"gain": 0.0}, ["it is not clearly different on average", "Not shown. "]),
        (
            {"forgets": False},
            ["TRACE did not forget enough", "fake (TRACE) and uniform never met the forgetting target"],
        ),
        ({"checkpoints": False}, ["is open, since nothing was scored on the way"]),
        ({"gold": False}, ["forgotten is at most 0.270, 0.02 above guessing."]),
        (
            {"without": "variants/uniform"},
            ["and kept a utility of ", "; no uniform run stands beside it."],
        ),
    ],
)
def test_the_verdict_says_what_is_not_so(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    missing = changes.pop("without", None)
    path = write_run(tmp_path / "run", **changes)
    if missing:
        shutil.rmtree(path / missing)
    data = gather(path)
    text = " ".join(verdict(data).lines)
    assert all(word in text for word in words), text
    assert not ("gain" in changes or "forgets" in changes) or "more utility" not in text
    assert "checkpoints" not in changes or "matched" not in tables.all_tables(data)


def headline_of(run: Path) -> dict[str, str]:
    """The row of the run's own arm at matched forgetting."""
    return next(row for row in rows_of(run / "report" / "matched.csv") if row["arm"] == "unlearned")


@pytest.mark.parametrize(
    ("forget", "after", "answer", "words"),
    [  # forget scores of original and unlearned model; the retrained one's is .34, of 80 questions
        (0.34, 0.34, "Nothing to forget", "had nothing to forget"),  # it never knew
        (0.37, 0.30, "Nothing to forget", "had nothing to forget"),  # two questions more: not clear
        (0.97, 0.97, "No", "forgot nothing"),
        (0.97, 0.94, "No", "forgot nothing"),  # two questions less: not clear
        (0.97, 0.60, "Not enough", "did not forget enough"),
        (0.97, 0.34, "Yes", "forgot what it should"),
    ],
)
def test_forgetting_is_told_by_the_interval_of_the_paired_difference(
    tmp_path: Path, forget: float, after: float, answer: str, words: str
) -> None:
    path = write_run(tmp_path / "run", knew=forget, ends=after)
    summary = verdict(gather(path))
    assert summary.answers[0].answer == answer and words in summary.sentence
    assert ("uniform weights" in summary.sentence) == (answer in ("Yes", "Not enough"))
    assert words in card_of(path)


def test_the_headline_of_the_configuration_is_everywhere(tmp_path: Path) -> None:
    names = ["elements exact_match", "near facts exact_match", "membership priv_leak"]
    path = write_run(tmp_path / "run")
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["evaluation"]["tasks"] = [dict(zip(("name", "headline"), n.rsplit(" ", 1), strict=True)) for n in names]
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    report(RunDirectory.at(path))
    records = rows_of(path / "report" / "scores.csv")
    assert {f"{r['task']} {r['metric']}" for r in records if r["headline"] == "True"} == set(names)
    data = gather(path)
    final = data.evaluations()["unlearned"]
    assert scores.mean_score(final, "utility") == final.value("near facts", "exact_match")
    text = " ".join(verdict(data).lines)
    assert "elements (exact match): " in text and "membership (priv leak): -30 after, -97 before" in text
    assert "near facts (exact match): " in text and "capitals" not in text.partition("Is TRACE")[0]
    card = card_of(path).partition("## All scores")[0]
    assert "| model | elements exact\\_match ↓ | membership priv\\_leak → | near facts exact\\_match ↑ |" in card
    page_text = (path / "report" / "index.html").read_text("utf-8")
    assert page_text.count(' headline"><th scope="row">') == 3


def test_forget_quality_is_compared_with_its_own_level() -> None:
    def score(value: float, task: str = "tofu", **changes: Any) -> Score:
        return Score("m", task, "forget_quality", value, 400, "forget", "higher", None, True, **changes)

    def summary(before: float, after: float) -> scores.TaskChange:
        original, final, gold = (Evaluation("m", [score(v)], {}) for v in (before, after, 1.0))
        arm = Arm("unlearned", "raking", None, None, {}, final)
        data = RunData(Path(), "", "", {}, {}, None, None, [], {"original": original, "gold": gold}, [arm], {})
        (result,) = scores.forgotten(data, final)
        return result.outcome

    cases = {(1e-9, 0.3): "forgotten", (1e-9, 0.01): "partly", (1e-9, 1e-9): "kept", (0.4, 0.4): "nothing"}
    assert {case: summary(*case) for case in cases} == cases


@pytest.mark.parametrize("stages", [("data", "statistics"), ("calibration",)])
def test_missing_stages_are_shown_as_not_run_yet(tmp_path: Path, stages: tuple[str, ...]) -> None:
    path = write_run(tmp_path / "run", stages=stages)
    text = render(path)
    verbs = {"statistics": "collect", "calibration": "calibrate", "evaluation": "evaluate"}
    for stage, verb in verbs.items():
        assert (f"<code>trace-ds {verb}</code>" in text) == (stage not in stages), stage


def test_nothing_at_all_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        report(RunDirectory.at(tmp_path / "missing"))
    RunDirectory(tmp_path).mark()
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="nothing to report"):
        report(RunDirectory.at(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".trace_ds.json", "config.yaml"]


def damage(path: Path, kind: str) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "missing":
        path.unlink()
    else:
        path.write_text("{")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("calibration/calibration.safetensors", "truncated"),
        ("variants/uniform/calibration/diagnosis.json", "missing"),
        ("statistics/forget/statistics.safetensors", "truncated"),
        ("config.yaml", "not json"),
    ],
)
def test_damaged_artefacts_are_named_and_the_old_report_stays(tmp_path: Path, name: str, kind: str) -> None:
    path = write_run(tmp_path / "run")
    (path / "report").mkdir()
    (path / "report" / "index.html").write_text("old")
    artefact.describe(path / "report", "report", {}, {}, {})
    damage(path / name, kind)
    with pytest.raises(UserError, match=Path(name).name) as error:
        report(RunDirectory.at(path))
    assert "Fix:" in error.value.line()
    assert (path / "report" / "index.html").read_text() == "old"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", hostile=HOSTILE)
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"name": HOSTILE}))
    text = render(path)
    outside = r"""(?:src|href)=["']?(?:https?:)?//|@import|url\((?!#)|https?://(?!www.w3.org/2000/svg)"""
    assert not re.search(outside, text)
    assert text.count("<script") == 2 and text.count("</script>") == 2  # the data and ours
    assert "<img" not in text
    data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]  # type: ignore[index]
    assert not set(data) & set("<>&\u2028\u2029")
    assert page.escape_json(HOSTILE)[1:-1] in data  # escaped, not changed
    assert "<script>" not in card_of(path)


def test_spreadsheet_formulas_are_defused() -> None:
    table = tables.make(["text", "value"], [["=HYPERLINK(1)", -1.5], ["@x", 2], ["plain, text", None]])
    assert table.to_csv() == "text,value\n'=HYPERLINK(1),-1.5\n'@x,2\n\"plain, text\",\n"


def test_model_card(run: Path) -> None:
    text = (run / "report" / "model_card.md").read_text("utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "base"  # the name, not a path of this machine
    assert "| fake (TRACE) | elements | accuracy ↓ | 0.3 | 80 | 0.25 |" in text
    assert plain_markdown("a|b *c* <i>\n# d") == r"a\|b \*c\* &lt;i&gt; \# d"
