"""PNG pictures of frontier and routing, for papers and model cards: the page's tables, byte-identical on a rerun.

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


def draw_all(run: RunData, tables: dict[str, Table], names: dict[str, str]) -> dict[str, bytes]:
    """PNG bytes by file name; a picture whose table is missing is left out. ``names``: of the arms, for people."""
    painters: dict[str, Callable[[Table], Figure]] = {
        "routing": lambda table: _routing(run, table),
        "curves": lambda table: _curves(run, table, names),
    }
    found = {}
    with _fixed_style():
        for name, paint in painters.items():
            if name in tables:
                buffer = io.BytesIO()
                paint(tables[name]).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
                found[f"{name}.png"] = buffer.getvalue()
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


def _curves(run: RunData, table: Table, names: dict[str, str]) -> Figure:
    """Utility against forgetting: near the target, and the whole way."""
    rows = [row for row in table.rows() if row["forget"] is not None and row["utility"] is not None]
    near = [row for row in rows if row["step"] > 0]
    goal, gold = targets(run), run.references.get(run.gold)
    level = sum(target.level for target in goal) / len(goal) if goal else None
    place = (mean_score(gold, "forget"), mean_score(gold, "utility")) if gold is not None else (None, None)
    figure, axes = _figure(1, 2, 4.8, 3.6)
    for axis, shown, title in ((axes[0, 0], near, "where it happens"), (axes[0, 1], rows, "the whole way")):
        for index, name in enumerate(dict.fromkeys(table.columns["arm"])):
            own = [row for row in shown if row["arm"] == name]
            again = index // len(COLOURS)  # colours come again with hollow markers of another shape
            look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "markersize": 4}
            for key, kinds in (("linestyle", DASHES), ("marker", MARKERS)):
                look[key] = kinds[(index + again) % len(kinds)]
            look |= {"markerfacecolor": "none"} if again % 2 else {}
            text = str(names.get(name, name)).lstrip("_") or "_"
            axis.plot([row["forget"] for row in own], [row["utility"] for row in own], label=text, **look)
            if own and axis is axes[0, 0]:
                axis.annotate(f"step {own[-1]['step']}", (own[-1]["forget"], own[-1]["utility"]), (5, 3),
                              textcoords="offset points", fontsize=7)  # fmt: skip
        if level is not None:
            axis.axvline(level, color="grey", linewidth=1, linestyle=":", label="target")
        if None not in place:
            axis.plot(*place, "D", color=COLOURS[5], label="gold")
        axis.invert_xaxis()
        axis.set(title=title, xlabel="forget score (lower → more forgotten)", ylabel="utility")
    axes[0, 1].legend(frameon=False)
    return figure
