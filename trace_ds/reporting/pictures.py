"""PNG pictures of the main plots, for papers and model cards: same tables as the page, byte-identical on a rerun.

Shape legend: L MoE layers, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.reporting.gather import RunData
from trace_ds.reporting.scores import mean_score, targets
from trace_ds.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0067a5", "#c44e00", "#007a59", "#a8478a", "#2f93cf", "#8a6100", "#5b5bd6", "#666f7b")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
DPI = 130


def draw_all(run: RunData, tables: dict[str, Table]) -> dict[str, bytes]:
    """PNG bytes by file name; a picture whose table is missing is left out."""
    painters: dict[str, tuple[str, Callable[[Table], Figure]]] = {
        "routing.png": ("routing", lambda table: _routing(run, table)),
        "curves.png": ("curves", lambda table: _curves(run, table)),
        "weights.png": ("weights", _weights),
        "training.png": ("training", _training),
        "drift.png": ("drift", _drift),
    }
    found = {}
    with _fixed_style():
        for name, (key, paint) in painters.items():
            if key in tables:
                buffer = io.BytesIO()
                paint(tables[key]).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
                found[name] = buffer.getvalue()
    return found


@contextmanager
def _fixed_style() -> Iterator[None]:
    """Matplotlib's own defaults: a user's matplotlibrc must not change the bytes."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
        # Corpus-derived labels must never be read as mathtext.
        matplotlib.rcParams["text.parse_math"] = False
        yield


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.asarray(figure.subplots(rows, columns, squeeze=False))


def _routing(run: RunData, table: Table) -> Figure:
    from matplotlib.colors import TwoSlopeNorm

    side = run.retain or run.forget
    assert side is not None
    shape = side.counts_LE.shape
    grids = [
        np.array([np.nan if v is None else v for v in table.columns[key]], dtype=float).reshape(shape)
        for key in ("forget_frequency", "retain_frequency", "log_ratio")
    ]
    selected_LE = np.array(table.columns["selected"]).reshape(shape)
    figure, axes = _figure(1, 3, 4.4, 1.6 + 0.06 * shape[0] + (1.2 if shape[0] <= 8 else 0))
    largest = float(np.nanmax([np.nanmax(grid) if np.isfinite(grid).any() else 0 for grid in grids[:2]])) or 1.0
    known = np.abs(grids[2][np.isfinite(grids[2])])
    span = max(float(np.quantile(known, 0.99)) if known.size else 0.0, float(np.log(2)))
    titles = ("forget: share of tokens", "retain: share of tokens", "log(forget / retain)")
    for index, (axis, grid, title) in enumerate(zip(axes[0], grids, titles, strict=True)):
        style: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0, "vmax": largest}
        if index == 2:
            style = {"cmap": "PuOr_r", "norm": TwoSlopeNorm(0.0, -span, span)}
        image = axis.imshow(grid, aspect="auto", interpolation="nearest", **style)
        layers, experts = np.nonzero(selected_LE)
        axis.plot(experts, layers, "o", color="white", markeredgecolor="black", markeredgewidth=0.5,
                  markersize=3.5 if shape[1] <= 32 else 1.6)  # fmt: skip
        axis.set(title=title, xlabel="expert", ylabel="layer" if index == 0 else "")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, shrink=0.9)
    return figure


def _lines(axis: Any, table: Table, group: str, x: str, y: str, keep: Callable[[dict[str, Any]], bool]) -> int:
    rows = [row for row in table.rows() if keep(row) and row[x] is not None and row[y] is not None]
    names = list(dict.fromkeys(table.columns[group]))
    for name in dict.fromkeys(row[group] for row in rows):
        own = [row for row in rows if row[group] == name]
        index = names.index(name)
        again = index // len(COLOURS)  # colours come again with hollow markers of another shape
        axis.plot(
            [row[x] for row in own],
            [row[y] for row in own],
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[(index + again) % len(DASHES)],
            marker=MARKERS[(index + again) % len(MARKERS)] if len(own) <= 40 else None,
            markerfacecolor="none" if again % 2 else None,
            markersize=4,
            label=str(name).lstrip("_") or "_",
        )
    return len(rows)


def _curves(run: RunData, table: Table) -> Figure:
    figure, axes = _figure(1, 2, 4.8, 3.4)
    _lines(axes[0, 0], table, "arm", "forget", "utility", lambda row: True)
    goal, gold = targets(run), run.references.get(run.gold)
    if goal is not None:
        axes[0, 0].axvline(
            sum(goal.values) / len(goal.values), color="grey", linewidth=1, linestyle=":", label="target"
        )
    if gold is not None:
        place = mean_score(gold, "forget"), mean_score(gold, "utility")
        if None not in place:
            axes[0, 0].plot(*place, "D", color=COLOURS[5], label="gold")
    axes[0, 0].invert_xaxis()
    axes[0, 0].set(title="utility against forgetting", xlabel="forget score (lower → more forgotten)", ylabel="utility")
    _lines(axes[0, 1], table, "arm", "step", "utility", lambda row: True)
    axes[0, 1].set(title="utility by step", xlabel="step")
    axes[0, 0].legend(frameon=False)
    return figure


def _weights(table: Table) -> Figure:
    figure, axes = _figure(1, 1, 5.6, 3.4)
    middle = [(low * high) ** 0.5 for low, high in zip(table.columns["low"], table.columns["high"], strict=True)]
    with_middle = Table(table.name, table.title, {**table.columns, "middle": middle})
    axis = axes[0, 0]
    varied = {row["arm"] for row in table.rows() if row["share"] < 0.999}  # all weights 1: the line at 1 says it
    _lines(axis, with_middle, "arm", "middle", "share", lambda row: row["arm"] in varied)
    axis.axvline(1.0, color="grey", linewidth=1, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(title="distribution of the retain weights", xlabel="weight", ylabel="share of tokens per quarter octave")
    if varied:
        axis.legend(frameon=False)
    return figure


def _training(table: Table) -> Figure:
    keys = [key for key in table.columns if key not in ("arm", "step")][:4]
    figure, axes = _figure(1, max(1, len(keys)), 3.6, 3.0)
    for axis, key in zip(axes[0], keys, strict=False):
        _lines(axis, table, "arm", "step", key, lambda row: True)
        axis.set(title=key, xlabel="step")
    axes[0, 0].legend(frameon=False)
    return figure


def _drift(table: Table) -> Figure:
    figure, axes = _figure(1, 2, 4.4, 3.2)
    for axis, corpus in zip(axes[0], ("forget", "retain"), strict=True):
        found = _lines(axis, table, "model", "layer", "overlap", lambda row, corpus=corpus: row["corpus"] == corpus)  # type: ignore[misc]
        axis.set(title=f"expert overlap with the original, {corpus} text", xlabel="layer", ylim=(0, 1.05))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if found:
            axis.legend(frameon=False)
    return figure
