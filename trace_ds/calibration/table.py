"""The terminal view of a calibration: what a person should see before spending GPU hours on it."""

from __future__ import annotations

import json
from typing import Any

from trace_ds.run.artefact import Artefact
from trace_ds.terminal import narrow_table

SHOWN_EXPERTS = 12
SHOWN_DOCUMENTS = 5
SHOWN_SOURCES = 8
SHOWN_LAYERS = 8


def told(artefact: Artefact) -> str:
    """The same in one line."""
    d = json.loads(artefact.file("diagnosis.json").read_text(encoding="utf-8"))
    experts = "NO forget-critical expert found" if d["none_found"] else f"{len(d['selected'])} forget-critical experts"
    effect = f"{d['rule']} closes {d['gap_closed']:.0%} of the gap" if d["constraints"] else f"{d['rule']} weights"
    warnings = len(d["warnings"])
    many = f", {warnings} warning{'s' * (warnings > 1)} in diagnosis.json" if warnings else ""
    return f"{experts}, {effect}{many}"


def print_table(artefact: Artefact, console: Any = None) -> None:
    """Print the diagnosis of a calibration artefact with rich (to ``console``, default: standard output)."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    d = json.loads(artefact.file("diagnosis.json").read_text(encoding="utf-8"))

    title = f"forget-critical experts ({d['detection']}): {len(d['selected'])}"
    experts = narrow_table(title, "layer", "expert", "p forget", "p retain", "ratio [95 %]", "target", "achieved")
    ranked = sorted(d["selected"], key=lambda r: -(r["ratio"] or 0.0))
    for r in ranked[:SHOWN_EXPERTS]:
        interval = (
            "-" if r["ratio_low"] is None or r["ratio_high"] is None else f"{r['ratio_low']:.2f}, {r['ratio_high']:.2f}"
        )
        experts.add_row(
            str(r["layer"]),
            str(r["expert"]),
            f"{r['forget']:.4f}",
            f"{r['retain']:.4f}",
            f"{r['ratio']:.2f} [{interval}]",
            f"{r['target']:.4f}" if r["in_scope"] else "-",
            "-" if r["achieved"] is None else f"{r['achieved']:.4f}",
        )
    console.print(experts)
    if len(ranked) > SHOWN_EXPERTS:
        console.print(f"... and {len(ranked) - SHOWN_EXPERTS} more in diagnosis.json")
    console.print(
        f"rule {d['rule']} ({d['level']}) over {d['constraints']} experts: lambda {d['lambda']:.3f}, effective sample "
        f"size {d['ess_fraction']:.3f} (floor {d['ess_floor']:g}; rows {d['row_ess_fraction']:.3f}), largest weight "
        f"{d['max_weight']:.2f}, gap closed {d['gap_closed']:.1%} (where rows are "
        f"drawn by their mean weight {d['gap_closed_by_rows']:.1%}), {d['iterations']} iterations"
    )
    console.print(
        "weights by quantile: " + ", ".join(f"{float(q):.0%} {w:.3g}" for q, w in d["weight_quantiles"].items()),
        highlight=False,
    )
    columns = ("entropy_forget_bits", "entropy_retain_bits", "entropy_weighted_bits", "js_bits", "js_weighted_bits")
    names = ["layer", "entropy forget", "retain", "weighted", "forget | retain: divergence", "weighted"]
    layers = narrow_table("selections by layer, in bits", *names)
    for r in sorted(d["layers"], key=lambda r: -r["js_bits"])[:SHOWN_LAYERS]:
        layers.add_row(str(r["layer"]), *("-" if r[key] is None else f"{r[key]:.3f}" for key in columns))
    console.print(layers)
    if len(d["layers"]) > SHOWN_LAYERS:
        console.print(f"the {SHOWN_LAYERS} of {len(d['layers'])} layers that differ most; all are in diagnosis.json")
    retrieval = d["retrieval"]
    if retrieval is not None:
        gap = (
            f", gap of the forget-critical experts {retrieval['gap_pool']:.3f} -> {retrieval['gap_kept']:.3f}"
            if "gap_pool" in retrieval
            else ""
        )
        console.print(
            f"retrieved {retrieval['rows']:,} of {retrieval['pool_rows']:,} rows by {retrieval['similarity']} "
            f"({retrieval['random_rows']:,} of them at random){gap}"
        )
        names = ["source", "share of the pool", "share of the kept rows"]
        kept = narrow_table("what was retrieved", *names, left=["source"])
        for r in retrieval["share_by_source"][:SHOWN_SOURCES]:
            kept.add_row(escape(r["source"]), f"{r['pool_share']:.1%}", f"{r['kept_share']:.1%}")
        console.print(kept)
    sources = narrow_table("where the weight went", "source", "share of tokens", "share of weight", left=["source"])
    for r in d["share_by_source"][:SHOWN_SOURCES]:
        sources.add_row(escape(r["source"]), f"{r['token_share']:.1%}", f"{r['weight_share']:.1%}")
    console.print(sources)
    names = ["weight", "tokens", "likeness", "source", "text"]
    documents = narrow_table("retain documents with the highest mean weight", *names, left=["source", "text"])
    for r in d["top_documents"][:SHOWN_DOCUMENTS]:
        documents.add_row(
            f"{r['weight']:.2f}",
            str(r["tokens"]),
            f"{r['likeness']:.2f}",
            escape(r["source"]),
            escape(" ".join(r["text_start"].split())[:60]),
        )
    console.print(documents)
    variance = d["variance"]
    console.print(
        f"variance of the weights: {variance['between']:.3g} between and {variance['within']:.3g} within documents "
        f"({variance['between_share']:.0%} between)",
        highlight=False,
    )
    if d["alike_share"] is not None:
        console.print(f"{d['alike_share']:.1%} of the retain tokens are in documents routed like the forget text")
    for warning in d["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
