"""The pages under docs/ say what the program says."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from typer.testing import CliRunner

from trace_ds.config.load import load_config
from trace_ds.config.sections.bench import BenchConfig
from trace_ds.studies.analysis import Comparison, matched
from trace_ds.studies.runs import grid_of

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*ROOT.glob("trace_ds/**/*.py"), *ROOT.glob("slurm/*.sh")]
LIBRARIES = ("_CanRecordRegistry", "CUDA out of memory", "Watchdog caught")  # said by others
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_message_of_the_troubleshooting_table_exists() -> None:
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in SOURCES))
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        if message.startswith(LIBRARIES):
            continue
        pieces = [re.escape(piece) for piece in re.split(r"…", message)]
        assert re.search(r"[^\n]*?".join(pieces), joined), message


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_commands(page: Path) -> None:
    """Relative links lead somewhere, named files of the repository exist, and every verb is one of the program's."""
    from trace_ds.cli import app

    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:trace_ds|tests|slurm|tools|ds_configs|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists() or name == "slurm/site.env", name
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for verb in re.findall(r"trace-ds ([a-z]+)\b", text):
        assert verb in verbs, verb


def commands_in_blocks() -> list[list[str]]:
    """The words of every ``trace-ds`` line of a code block under docs/ that names recipes; quotes may span lines.

    Those with placeholders need a run; the lines of cluster.md (``$ …``) are typed by test_cluster_page.py.
    """
    results = []
    for page in PAGES[1:]:
        text = page.read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if language in ("", "bash"):
                lines = re.findall(r"^trace-ds (?:[^'\n]|'[^']*')*", block, re.MULTILINE)
                results += [shlex.split(line, comments=True)[1:] for line in lines]
    return [words for words in results if not {"CONFIG", "config.yaml"} & {*words}]


@pytest.mark.parametrize("words", commands_in_blocks(), ids=" ".join)
def test_commands_in_blocks_are_accepted(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say is understood, up to the work itself."""
    from trace_ds.cli import app

    if words[0] == "bench":
        config, _ = load_config(
            words[1], [value for flag, value in itertools.pairwise(words) if flag == "--set"], "out"
        )
        assert config.bench is not None
        return
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words, *([] if words[0] == "plan" else ["--dry-run"])])
    assert done.exit_code == 0 and done.output, (done.output, done.exception)


def test_the_configuration_of_the_quickstart_fits_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's whole configuration is accepted with files of the page's form; the memory is what the page says."""
    from transformers import OlmoeConfig

    from trace_ds.cli import app

    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    config = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert config is not None
    monkeypatch.chdir(tmp_path)
    for name, line in re.findall(r"^(\w+\.jsonl) +(\{.*\})$", page, re.MULTILINE):
        Path(name).write_text(f"{line}\n" * 8, encoding="utf-8")
    OlmoeConfig(intermediate_size=1024).save_pretrained("olmoe")  # the shape of allenai/OLMoE-1B-7B-0924
    Path("config.yaml").write_text(config[1].replace("allenai/OLMoE-1B-7B-0924", "olmoe"), encoding="utf-8")
    for line in re.findall(r"^trace-ds ((?:plan|run) [^#\n]+)", page, re.MULTILINE):
        words = [*line.split(), *(["--json"] if line.startswith("plan") else ["--dry-run"])]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output)
        if words[0] == "plan":
            job = json.loads(done.output)["stages"]["unlearn"]
    assert job["fits"] and f"{job['memory']['peak_bytes'] / 1e9:.0f} of 75 GB at the peak" in page


README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in STUDIES.split("\n## ")}
ENTANGLED = next(text for title, text in SECTIONS.items() if "bench_entangled" in title)
ABLATIONS = next(text for title, text in SECTIONS.items() if "bench_ablations" in title)
NEAR = next(text for title, text in SECTIONS.items() if "near text" in title)
VERBATIM = next(text for title, text in SECTIONS.items() if "bench_verbatim" in title)
PUBLISHED = [
    ("entangled", 0.302, ENTANGLED, "sampling", "**TRACE, sampling retain rows**"),
    ("entangled", 0.302, ENTANGLED, "weighting", "TRACE, weighting the loss"),
    ("entangled", 0.302, ENTANGLED, "permuted", "control: weights permuted over rows"),
    ("ablations", 0.302, ABLATIONS, "sampling", "sampling, all experts, floor .3 (as above)"),
    ("ablations", 0.302, ABLATIONS, "sampling_selected", "… detected experts only"),
    ("ablations", 0.302, ABLATIONS, "sampling_ess_50", "… floor .5"),
    ("ablations", 0.302, ABLATIONS, "weighting", "weighting the loss instead of sampling"),
    ("ablations", 0.302, ABLATIONS, "random_experts", "control: as many experts drawn at random"),
    ("ablations", 0.302, ABLATIONS, "permuted", "control: weights permuted over rows"),
    ("ablations", 0.302, ABLATIONS, "oracle_near", "oracle: near facts by their label, floor .3"),
    ("ablations", 0.302, ABLATIONS, "oracle_elements", "oracle: numbers of elements by their label, floor .3"),
    ("verbatim", 0.0653, VERBATIM, "sampling", "TRACE, sampling retain rows"),
    ("verbatim", 0.0653, VERBATIM, "weighting", "TRACE, weighting the loss"),
    ("verbatim", 0.0653, VERBATIM, "permuted", "control: weights permuted over rows"),
]


SHARES = ["scarce", "absent"]  # the recipe bench_ablations in other regimes, one column each
OF_SHARES = [
    ("sampling", "TRACE, sampling retain rows"),
    ("weighting", "TRACE, weighting the loss"),
    ("permuted", "control: weights permuted over rows"),
]


@functools.cache
def published(study: str, target: float) -> tuple[str, list[dict[str, Any]]]:
    """The first utility metric of a study and its comparisons, from the published CSV."""
    from tools.study_from_csv import read_curves

    config, _ = load_config("bench_ablations" if study in (*SHARES, "rows") else f"bench_{study}", [], "out")
    assert config.bench is not None
    curves = read_curves(config, ROOT / "docs" / "studies" / f"{study}.csv")
    return config.bench.utility[0], Comparison(config, curves, functools.partial(matched, target=target)).rows()


@pytest.mark.parametrize(("study", "target", "page", "method", "name"), PUBLISHED)
def test_the_published_comparisons_follow_from_the_published_scores(
    study: str, target: float, page: str, method: str, name: str
) -> None:
    metric, rows = published(study, target)
    cells = next(line for line in page.splitlines() if line.startswith(f"| {name} |")).split("|")[2:-1]
    strengths = tuple(dict.fromkeys(row["strength"] for row in rows))
    if strengths == ("same strength",):
        cells = cells[1:2]
    for strength, cell in itertools.zip_longest(strengths, cells, fillvalue=cells[-1]):
        if cell.strip() != "–":
            expected = (strength, method, metric, "post")
            row = next(r for r in rows if (r["strength"], r["method"], r["metric"], r["at"]) == expected)
            assert_told(row, cell)


def test_the_gains_over_permuted_weights_follow_from_the_published_scores() -> None:
    from tools.study_from_csv import read_curves

    config, _ = load_config("bench_entangled", ["bench.baseline=permuted"], "out")
    curves = read_curves(config, ROOT / "docs" / "studies" / "entangled.csv")
    rows = Comparison(config, curves, functools.partial(matched, target=0.302)).rows()
    for strength in ("same strength", "own alpha"):
        key = (strength, "sampling", "kept_facts exact_match", "post")
        row = next(r for r in rows if (r["strength"], r["method"], r["metric"], r["at"]) == key)
        assert_told(row, STUDIES)


LITERAL = next(text for title, text in SECTIONS.items() if "bench_literal" in title)
LITERAL_ROWS = {
    "uniform": "uniform weights",
    "sampling": "**TRACE, sampling retain rows**",
    "literal": "the literal reading: detected experts, mean ratio, weights of the loss",
    "weighting": "raking over all experts, weights of the loss",
    "permuted": "control: weights permuted over rows",
}


def gain(row: dict[str, Any]) -> str:
    low, high = (100 * row["relative_interval"][end] for end in ("low", "high"))
    return f"{100 * row['relative']:+.1f} % [{low:.1f}, {high:.1f}]".replace("-", "−")


def test_the_study_of_the_literal_reading_follows_from_its_scores() -> None:
    from tools.study_from_csv import read_curves

    curves_of, target = {}, 0.28888  # the mean of the gold models of seeds 201 to 216, .2389, plus the margin
    results = {}
    for baseline in ("uniform", "permuted"):
        config, _ = load_config("bench_literal", [f"bench.baseline={baseline}"], "out")
        curves_of[baseline] = read_curves(config, ROOT / "docs/studies/literal.csv")
        rows = Comparison(config, curves_of[baseline], functools.partial(matched, target=target)).rows()
        results |= {(baseline, r["method"], r["at"]): r for r in rows if r["metric"] == "kept_facts exact_match"}
    for method, name in LITERAL_ROWS.items():
        post = results["uniform", method, "post"]
        cells = next(line for line in LITERAL.splitlines() if line.startswith(f"| {name} |")).split("|")[2:-1]
        utility = f"{post['value']:.3f}".lstrip("0") + ("" if method == "uniform" else f", {gain(post)}")
        assert cells[1].strip() == f"{utility}, {len(post['seeds'])} seeds"
        if method == "uniform":
            assert cells[2].strip() == f"{results['uniform', method, 'end']['value']:.3f}".lstrip("0")
        else:
            assert cells[2].strip() == gain(results["uniform", method, "end"])
        if method not in ("uniform", "permuted"):
            against = results["permuted", method, "post"]
            assert cells[3].strip() == f"{gain(against)}, {len(against['seeds'])} seeds"
        strength = next(curve.strength for curve in curves_of["uniform"] if curve.method == method)
        assert strength == f"alpha={cells[0].strip()}"
    assert gain(results["permuted", "sampling", "end"]) in LITERAL


def test_the_strengths_of_the_literal_study_are_the_best_on_the_screening_seeds() -> None:
    """Most seeds that forgot, then the highest utility: what the recipe's plan says."""
    from tools.study_from_csv import read_curves

    config, _ = load_config("bench_literal", [], "out")
    curves = read_curves(config, ROOT / "docs/studies/literal_screening.csv")
    screening = Comparison(config, curves, functools.partial(matched, target=0.31589))
    assert config.bench is not None and screening.seeds == [101, 102, 103, 104]
    for method, changes in config.bench.methods.items():
        mine = [curve for curve in curves if curve.method == method]
        assert screening.best_strength(mine, screening.seeds) == f"alpha={changes['unlearning.alpha']}"
        strengths = sorted(int(curve.strength.removeprefix("alpha=")) for curve in mine)
        assert strengths[0] < changes["unlearning.alpha"] < strengths[-1]  # none at an edge


@pytest.mark.parametrize("method", ["row_50", "sampling"])
def test_the_gains_of_row_weights_follow_from_the_published_scores(method: str) -> None:
    metric, rows = published("rows", 0.302)
    row = next(r for r in rows if (r["method"], r["metric"], r["at"]) == (method, metric, "post"))
    assert_told(row, ABLATIONS.partition("With weights calibrated by row")[2])


@pytest.mark.parametrize(("method", "name"), OF_SHARES)
def test_the_comparisons_by_near_share_follow_from_the_published_scores(method: str, name: str) -> None:
    cells = next(line for line in NEAR.splitlines() if line.startswith(f"| {name} |")).split("|")[2:-1]
    for study, cell in zip(SHARES, cells, strict=True):
        metric, rows = published(study, 0.30833333333333335)
        assert_told(next(r for r in rows if (r["method"], r["metric"], r["at"]) == (method, metric, "post")), cell)


MATCHED = {
    "selected": "the detected ones (`selected`)",
    "random_experts": "control: as many at random (ten draws per split)",
    "lowest_experts": "control: as many of the lowest ratio",
    "all": "all of the layers that are trained",
    "oracle": "oracle: facts by their label",
}


PRETRAINED = next(text for title, text in SECTIONS.items() if "bench_pretrained" in title)


def test_the_quality_of_the_pretrained_model_is_that_of_the_file() -> None:
    quality = json.loads((ROOT / "docs/studies/pretrained_quality.json").read_text(encoding="utf-8"))
    dense, moe = quality["dense"], quality["moe"]
    pairs = [(f"{dense['perplexity'][kind]:.1f}", f"{result:.1f}") for kind, result in moe["perplexity"].items()]
    for kind, result in moe["facts"].items():
        pairs.append(tuple(f"{of['accuracy']:.3f}".lstrip("0") for of in (dense["facts"][kind], result)))
    summary = re.findall(r"^\| (?:perplexity, .*|.*accuracy .*) \| (\S+) \| (\S+) \|$", PRETRAINED, re.MULTILINE)
    assert sorted(summary) == sorted(pairs) and len(summary) == 6


def test_the_weights_of_the_pretrained_model_are_those_of_the_csv() -> None:
    with (ROOT / "docs/studies/pretrained_weights.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    result: dict[str, dict[str, list[float]]] = {}
    for method, name in MATCHED.items():
        mine = [row for row in rows if row["method"] == method]
        gains = {
            k: [float(row[f"{k}_weight"]) / float(row[f"{k}_tokens"]) for row in mine] for k in ("facts", "numbers")
        }
        cells = [f"{mean(v):.2f} [{min(v):.2f}, {max(v):.2f}]" for v in gains.values()]
        size = f"{mean(float(row['ess_rows']) for row in mine):.2f}".lstrip("0")
        assert f"| {name} | {' | '.join(cells)} | {size} |" in PRETRAINED
        result[method] = gains
    for kind in ("facts", "numbers"):  # in every split above all of its ten draws
        draws = result["random_experts"][kind]
        assert len(draws) == 50
        assert all(x > max(draws[10 * i : 10 * i + 10]) for i, x in enumerate(result["selected"][kind]))


KEPT = {
    "selected": "TRACE, the detected experts (`selected`)",
    "all": "TRACE, all experts of the layers that are trained",
    "weighting": "TRACE, the detected experts, weighting the loss",
    "random_experts": "control: as many at random",
    "lowest_experts": "control: as many of the lowest ratio",
    "permuted": "control: detected, weights permuted over rows",
    "oracle": "oracle: facts by their label",
}
FACTS, NUMBERS = "kept_facts choice_probability", "kept_facts choice_probability near/*element*"
COLUMNS = [  # strength and metric of each column
    ("same strength", FACTS),
    ("own alpha", FACTS),
    ("own alpha", "kept_facts accuracy"),
    ("own alpha", NUMBERS),
]


@functools.cache
def pretrained_rows(*changes: str) -> tuple[BenchConfig, list[dict[str, Any]]]:
    from tools.study_from_csv import over_levels, read_curves

    config, _ = load_config("bench_pretrained", [*changes], "out")
    assert config.bench is not None
    over = functools.partial(over_levels, low=0.50, high=0.65)
    return config.bench, Comparison(config, read_curves(config, ROOT / "docs/studies/pretrained.csv"), over).rows()


@pytest.mark.parametrize(("method", "name"), [("uniform", "uniform weights"), *KEPT.items()])
def test_the_runs_on_the_pretrained_model_are_those_of_the_csv(method: str, name: str) -> None:
    cells = [kept_told(method, *column) for column in COLUMNS]
    assert f"| {' | '.join([name, *cells])} |" in PRETRAINED


def test_the_gains_on_the_pretrained_model_are_those_of_the_csv() -> None:
    _, rows = pretrained_rows()
    result = {tuple(row[key] for key in ("method", "strength", "metric", "at")): row for row in rows}
    for method, metric in (
        ("selected", FACTS),
        ("selected", "kept_facts accuracy"),
        ("selected", NUMBERS),
        ("random_experts", FACTS),
        ("oracle", FACTS),
    ):
        assert_told(result[method, "own alpha", metric, "post"], PRETRAINED)
    same = {key[0]: row["value"] for key, row in result.items() if key[1:] == ("same strength", FACTS, "post")}
    matched_ones = [same[name] for name in ("selected", "all", "random_experts", "lowest_experts")]
    text = " ".join(PRETRAINED.split())
    assert re.sub(r"0\.", ".", f"keep the same to {max(matched_ones) - min(matched_ones):.3f}") in text
    _, rows = pretrained_rows("bench.baseline=random_experts")
    row = next(r for r in rows if (r["method"], r["strength"], r["metric"]) == ("selected", "own alpha", FACTS))
    low, high = (row["difference_t_interval"][end] for end in ("low", "high"))
    summary = f"{row['difference']:.3f} ahead of the random ones [{low:+.3f}, {high:+.3f}]; "
    summary += f"{row['detectable']:.3f} would have"
    assert re.sub(r"0\.", ".", summary).replace("-", "−") in text


def kept_told(method: str, strength: str, metric: str) -> str:
    bench, rows = pretrained_rows()
    if strength != "same strength" and len(grid_of(bench, method)["unlearning.alpha"]) < 2:
        return "–"
    expected = (method, strength, metric, "post")
    row = next(r for r in rows if tuple(r[key] for key in ("method", "strength", "metric", "at")) == expected)
    summary = f"{row['value']:.3f}"
    if method != bench.baseline:
        low, high = (row["difference_t_interval"][end] for end in ("low", "high"))
        summary += f", {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    summary += "" if len(row["seeds"]) == len(bench.seeds) else f", {len(row['seeds'])} splits"
    return re.sub(r"(?<!\d)0\.", ".", summary).replace("-", "−")


def assert_told(row: dict[str, Any], cell: str) -> None:
    low, high = (100 * row["relative_interval"][end] for end in ("low", "high"))
    summary = f"{100 * row['relative']:+.1f} % [{low:.1f}, {high:.1f}]".replace("-", "−")
    assert summary in cell, (summary, cell)
    seeds = len(row["seeds"])
    assert seeds == 5 or f"{seeds} seeds" in cell or f"{seeds} of 5" in cell


def test_the_readme_tells_what_the_studies_found() -> None:
    summary = re.findall(r"[+−][\d.]+ %\s\[[^]]+\]", README)
    assert len(summary) >= 4
    for result in summary:
        assert " ".join(result.split()) in STUDIES, result


def test_every_metric_is_explained() -> None:
    """The metrics and the table of docs/evaluation.md name the same metrics."""
    from trace_ds.evaluation.metrics import METRICS

    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = text.partition("| metric | range | chance |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}
    assert named == set(METRICS)
