"""``trace-ds report CONFIG``: one self-contained page, its CSV files, scores and a model card.

    trace-ds report runs/mine

Reads artefacts only, so it can be run at any time: what is not there yet is shown as not run yet. Writes
``RUN/report/{index.html, model_card.md, *.csv, artefact.json}``, replaced as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trace_ds import __version__
from trace_ds.conversion.card import LIMITS, model_card, model_name, plain_markdown, table
from trace_ds.evaluation.metrics import ARROWS
from trace_ds.reporting.gather import BASE_MODEL, gather
from trace_ds.reporting.scores import headline_table
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory, unwritable
from trace_ds.run.files import replacing_directory
from trace_ds.run.log import stage_log

if TYPE_CHECKING:
    from rich.table import Table

    from trace_ds.config.schema import Config
    from trace_ds.parallel.world import World
    from trace_ds.reporting.gather import RunData
    from trace_ds.reporting.verdict import Verdict

PAPER = (
    "TRACE (Xie, Lin, Xiong, Zhang, Li; arXiv 2606.10338) is public as an abstract only; the equations used here are "
    "decisions of trace_ds."
)


@dataclass(frozen=True)
class ReportJob:
    """The page of a run and its variants, made anew each time: what it shows is read from the artefacts."""

    config: Config
    place: RunDirectory

    def done(self) -> bool:
        return False

    def run(self, world: World | None = None) -> None:
        self.place.store_config()  # the page shows it
        report(self.place)


def preflight(config: Config, run: RunDirectory, processes: int = 1, *, download: bool = False) -> None:
    """Nothing: whatever is there can be reported."""


def check(config: Config, run: RunDirectory, processes: int = 1) -> ReportJob:
    return ReportJob(config, run)


def report(run: RunDirectory) -> Path:
    """Write the report of a run; returns the page's path.

    Raises:
        UserError: the run directory is missing or holds nothing at all, an artefact is damaged, or the report cannot be
            written; an existing report is left as it was.
    """
    from trace_ds.reporting import page, tables
    from trace_ds.reporting.verdict import verdict

    run.require_ours()
    data = gather(run.path)
    all_tables, summary = tables.all_tables(data), verdict(data)
    files: dict[str, str] = {
        "index.html": page.render_page(data, summary, all_tables),
        "model_card.md": model_card_of(data, summary),
        **{f"{name}.csv": table.to_csv() for name, table in all_tables.items()},
    }
    try:
        with stage_log(run, "report") as log:
            _write(run, files)
            log.done(f"{len(all_tables)} tables: {run.report / 'index.html'}")
    except OSError as error:
        raise unwritable(run.report, error) from None
    return run.report / "index.html"


def model_card_of(run: RunData, verdict: Verdict) -> str:
    """The card of the unlearned model: what was done, how well, and what is not claimed."""
    settings = run.config.get("unlearning") or {}
    loss, steps = (plain_markdown(str(settings.get(key, "not recorded"))) for key in ("forget_loss", "steps"))
    rules = ", ".join(f"{arm.title}: {arm.rule}" for arm in run.arms if arm.rule) or "not recorded"
    settings_line = f"Forget loss: {loss}; steps: {steps}; retain weights: {plain_markdown(rules)}."
    first_line = f"Unlearned with trace_ds {__version__}. {settings_line}"
    names, values = headline_table(run)
    first = [[run.title_of(model), *row] for model, row in values.items()]
    titles = ("model", *(plain_markdown(f"{score.task} {score.metric} {ARROWS[score.direction]}") for score in names))
    rows = []
    for name, evaluation in run.evaluations().items():
        for one in evaluation.scores:
            count, chance = ("–" if value is None else value for value in (one.n, one.chance))
            metric = f"{one.metric} {ARROWS[one.direction]}"
            rows.append([run.title_of(name), one.task, metric, one.value, count, chance])
    head = ("model", "task", "metric", "value", "n", "chance")
    sections = {
        "Headline scores": table(first, titles) if first else ["Not evaluated yet."],
        "All scores": table(rows, head) if rows else ["Not evaluated yet."],
        "Limits": [f"- {line}" for line in (PAPER, *LIMITS)],
        "Versions": [f"- {plain_markdown(name)} {plain_markdown(version)}" for name, version in run.versions.items()],
    }
    path = (run.config.get("model") or {}).get("path")
    base = run.versions.get(BASE_MODEL, model_name(str(path)) if path else "").partition("@")[0]
    return model_card(
        run.title,
        base,
        ["unlearning"],
        [first_line, *(f"\n{plain_markdown(line)}" for line in verdict.lines)],
        sections,
    )


def report_summary(run: RunDirectory) -> tuple[Table, str]:
    """For the terminal: the table of scores, and what the run's numbers show, in plain words."""
    from trace_ds.reporting import scores
    from trace_ds.reporting.verdict import verdict

    data = gather(run.path)
    return scores.summary_table(data), "\n".join(verdict(data).lines)


def _write(run: RunDirectory, files: dict[str, str]) -> None:
    """Replace the report as a whole."""
    run.clear_leftovers()
    with replacing_directory(run.report) as directory:
        for name, content in files.items():
            (directory / name).write_text(content, encoding="utf-8", newline="")
        artefact.describe(directory, "report", {}, {}, {})
