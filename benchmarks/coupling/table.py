"""What the rows of the zoo say: counts a family, one line a network, and seconds against the number of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.coupling.depgraph import OUTCOMES

Row = dict[str, Any]
Key = tuple[str, str]

SHARES = ("macs_removed_at_30", "macs_removed_at_all", "macs_touched")
LIMIT_S = 10
"""Seconds that capture, groups and proofs of ResNet-50 may take."""


def report(rows: dict[Key, Row]) -> str:
    """Counts over every family, and what freezes most."""
    lines = []
    for family in sorted({family for family, _ in rows}):
        own = [row for (f, _), row in rows.items() if f == family]
        lines.append(f"{family}: " + ", ".join(f"{name} {count}" for name, count in counts(own).items()))
        for key in SHARES:
            values = [row[key] for row in own if key in row]
            if values:
                lines.append(f"  {key}: median {np.median(values):.3f}, lowest {min(values):.3f}")
        reasons: Counter[str] = Counter()
        for row in own:
            reasons.update(list(row.get("frozen", {})))
        lines += [f"  {count:4} networks: {reason}" for reason, count in reasons.most_common(12)]
    return "\n".join(lines)


def counts(own: Sequence[Row]) -> dict[str, int]:
    """How many networks came how far."""
    pruned = [row for row in own if row.get("offered")]
    return {
        "tried": len(own),
        "captured": sum(bool(row.get("captured")) for row in own),
        "with groups": len(pruned),
        "all proved": sum(not row["refuted"] for row in pruned),
        "cut equal": sum(bool(row.get("cut_equal")) for row in pruned),
        "trained": sum(bool(row.get("trained")) for row in pruned),
        "ONNX equal": sum(bool(row.get("onnx_equal")) for row in pruned),
        "narrowed equal": sum(bool(row.get("narrow_equal")) for row in pruned),
    }


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown(rows: dict[Key, Row]) -> str:
    """Totals a family and over all, Torch-Pruning beside ours, then one line a network."""
    every = list(rows.values())
    named = [(f, [r for (g, _), r in rows.items() if g == f]) for f in sorted({family for family, _ in rows})]
    named.append(("**all**", every))
    return "\n".join([*_ours(named), "", *_theirs(named), "", *_each(rows)])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---", *["---:"] * (len(cells) - 1)])]


def _ours(named: Sequence[tuple[str, list[Row]]]) -> list[str]:
    lines = _head(["ours", *counts([]), "MACs of layers that may be pruned", "MACs removed at 30 %"])
    for family, own in named:
        shares = [_median(own, key) for key in ("macs_touched", "macs_removed_at_30")]
        lines.append(_line([family, *counts(own).values(), *shares]))
    return lines


def _theirs(named: Sequence[tuple[str, list[Row]]]) -> list[str]:
    """Outcomes of Torch-Pruning; its shares of MACs over networks that it cuts right, and ours over the same."""
    seen = [r["torch_pruning"]["outcome"] for _, own in named for r in own if "torch_pruning" in r]
    columns = [outcome for outcome in OUTCOMES if outcome in seen]
    lines = _head(["Torch-Pruning", "run", *columns, "MACs that may be pruned", "ours there", "at 30 %", "ours there"])
    for family, own in named:
        run = [row for row in own if "torch_pruning" in row]
        outcomes = Counter(row["torch_pruning"]["outcome"] for row in run)
        right = [row for row in run if row["torch_pruning"]["outcome"] in ("equal", "scale")]
        shares = []
        for key in ("macs_touched", "macs_removed_at_30"):
            shares += [_median([row["torch_pruning"] for row in right], key), _median(right, key)]
        lines.append(_line([family, len(run), *(outcomes[c] for c in columns), *shares]))
    return [*lines, "", *(f"- {outcome}: {OUTCOMES[outcome]}" for outcome in columns)]


def _each(rows: dict[Key, Row]) -> list[str]:
    lines = _head([
        "network", "layers", "groups", "refuted", "MACs may", "at 30 %", "cut", "ONNX", "narrowed",
        "capture to proofs, s", "Torch-Pruning", "MACs may", "at 30 %", "s",
    ])  # fmt: skip
    for (family, name), row in sorted(rows.items()):
        theirs = row.get("torch_pruning", {})
        verdicts = [_verdict(row, key) for key in ("cut_equal", "onnx_equal", "narrow_equal")]
        refuted = sum(row.get("refuted", {}).values())
        lines.append(
            _line([
                f"{family}/{name}", row.get("layers", "-"), row.get("offered", "-"), refuted,
                *(_share(row, key) for key in ("macs_touched", "macs_removed_at_30")), *verdicts, _seconds_told(row),
                theirs.get("outcome", "-"), *(_share(theirs, key) for key in ("macs_touched", "macs_removed_at_30")),
                theirs.get("seconds", "-"),
            ])
        )  # fmt: skip
    return lines


def _verdict(row: Row, key: str) -> str:
    return {True: "equal", False: "differs", None: "-"}[row.get(key)]


def _share(row: Row, key: str) -> str:
    return f"{100 * row[key]:.1f} %" if key in row else "-"


def _median(own: Sequence[Row], key: str) -> str:
    values = [row[key] for row in own if key in row]
    return f"{100 * np.median(values):.1f} %" if values else "-"


# --- seconds -------------------------------------------------------------------------------------------------------


def seconds(row: Row) -> float | None:
    """Capture, groups and proofs together; None where one of them did not end."""
    steps = [row.get("seconds", {}).get(step) for step in ("capture", "groups", "proofs")]
    return None if None in steps or "layers" not in row else float(sum(steps))


def _seconds_told(row: Row) -> str:
    taken = seconds(row)
    return "-" if taken is None else f"{taken:.1f}{'*' if 'beside' in row else ''}"


def growth(rows: Sequence[Row]) -> float:
    """Power of the number of layers that seconds grow with: the slope of a line fitted to both logarithms."""
    layers, taken = np.log([(row["layers"], taken) for row in rows if (taken := seconds(row))]).T
    return float(np.polyfit(layers, taken, 1)[0])


def draw(rows: dict[Key, Row], path: Path) -> None:
    """Seconds of capture, groups and proofs against layers, one point a network, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    for family in sorted({family for family, _ in rows}):
        own = [row for (f, _), row in rows.items() if f == family and seconds(row)]
        points = [(row["layers"], seconds(row)) for row in own]
        if points:
            panel.scatter(*zip(*points, strict=True), s=14, alpha=0.7, label=f"{family} ({len(points)})")
    mark = rows.get(("torchvision", "resnet50"), {})
    if seconds(mark):
        panel.annotate("ResNet-50", (mark["layers"], seconds(mark)), xytext=(6, -10), textcoords="offset points")
    panel.axhline(LIMIT_S, color="0.5", lw=0.8, ls="--", label=f"{LIMIT_S} s")
    power = growth(list(rows.values()))
    panel.set(xscale="log", yscale="log", xlabel="layers that multiply", ylabel="capture, groups and proofs, s")
    beside = sum("beside" in row for row in rows.values())
    panel.set_title(f"seconds ~ layers^{power:.2f}; one core, {beside} of {len(rows)} networks beside other work")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
