"""The log of a training as curves: metrics.jsonl, and the picture of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Title of a panel -> name in metrics.jsonl -> label of the line.
PANELS = {
    "loss": {"loss": "training", "eval_loss": "held out"},
    "share of puzzles solved": {
        "eval_exact_match": "held out, greedy",
        "rewards/exact_match/mean": "training samples",
    },
    "reward": {"reward": "mean", "reward_std": "spread (standard deviation)"},
    "share of groups and completions": {
        "frac_reward_zero_std": "groups without signal",
        "completions/clipped_ratio": "completions cut off",
        "completions/stopped_ratio": "completions ended by a wrong token",
        "completions/repetition_excess": "repetition beyond the solutions'",
    },
    "entropy, divergence (nats)": {
        "entropy": "entropy of the policy",
        "kl": "KL to the start, training samples",
        "eval_kl": "KL to the start, held out",
    },
    "tokens per second": {"tokens_per_s": "training"},
}
LABELS = {name: label for lines in PANELS.values() for name, label in lines.items()}
COLUMNS = 3  # of the picture


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl as dicts, without a last line that was cut by a kill."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_metrics(metrics: str | Path, out: str | Path) -> None:
    """Draw the curves of a metrics.jsonl (a JSON object a line, with "step" and numbers) into the PNG `out`."""
    from matplotlib.figure import Figure

    curves = find_curves(read_metrics(metrics))
    columns = min(COLUMNS, max(1, len(curves)))
    rows = max(1, math.ceil(len(curves) / columns))
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes, curves.items(), strict=False):
        draw_curves(axis, title, lines)
    figure.savefig(out, dpi=120)


def find_curves(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The curves of a metrics.jsonl's records: title of PANELS -> name -> points (step, value); without empty ones."""
    curves = {}
    for title, names in PANELS.items():
        lines = {n: [(r["step"], r[n]) for r in records if isinstance(r.get(n), (int, float))] for n in names}
        if any(lines.values()):
            curves[title] = {name: points for name, points in lines.items() if points}
    return curves


def draw_curves(axis: Any, title: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Draw one panel of `find_curves` into an axis of matplotlib."""
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=LABELS[name], marker="." if len(points) < 30 else None, linewidth=1.2)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
