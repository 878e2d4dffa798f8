"""Pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("share of puzzles solved", ("eval_exact_match", "rewards/exact_match/mean")),
    ("reward", ("reward",)),
    ("tokens per second", ("tokens_per_s",)),
)
LABELS = {
    "loss": "training",
    "eval_loss": "held out",
    "eval_exact_match": "held out, greedy",
    "rewards/exact_match/mean": "training samples",
    "reward": "mean reward",
    "tokens_per_s": "training",
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl as dicts; a last line that was cut by a kill is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_metrics(metrics: str | Path, out: str | Path) -> None:
    """Draw the curves of a metrics.jsonl into a PNG: loss, exact match, reward and speed, where there are any.

    Args:
        metrics: the file, one JSON object a line with "step" and numbers.
        out: the PNG to write.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    curves = {}
    for title, names in PANELS:
        found = {n: [(r["step"], r[n]) for r in records if isinstance(r.get(n), (int, float))] for n in names}
        if any(found.values()):
            curves[title] = {n: points for n, points in found.items() if points}
    figure = Figure(figsize=(4.5 * max(1, len(curves)), 3.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, curves.items(), strict=False):
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=LABELS[name], marker="." if len(points) < 30 else None, linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(out, dpi=120)


def write_report(results, path):
    """Stub."""
    Path(path).write_text("")
