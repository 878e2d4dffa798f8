"""Curves of a training: its log, and the picture of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("share of puzzles solved", ("eval_exact_match", "rewards/exact_match/mean")),
    ("reward", ("reward", "reward_std")),
    (
        "share of groups and completions",
        (
            "frac_reward_zero_std",
            "completions/clipped_ratio",
            "completions/stopped_ratio",
            "completions/repetition_excess",
        ),
    ),
    ("entropy, divergence (nats)", ("entropy", "kl", "eval_kl")),
    ("tokens per second", ("tokens_per_s",)),
)
COLUMNS = 3  # of the picture
LABELS = {
    "loss": "training",
    "eval_loss": "held out",
    "eval_exact_match": "held out, greedy",
    "rewards/exact_match/mean": "training samples",
    "reward": "mean",
    "reward_std": "spread (standard deviation)",
    "frac_reward_zero_std": "groups without signal",
    "completions/clipped_ratio": "completions cut off",
    "completions/stopped_ratio": "completions ended by a wrong token",
    "completions/repetition_excess": "repetition beyond the solutions'",
    "entropy": "entropy of the policy",
    "kl": "KL to the start, training samples",
    "eval_kl": "KL to the start, held out",
    "tokens_per_s": "training",
}


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
    """Draw the curves of a metrics.jsonl into a PNG: those of PANELS of which there is any.

    Args:
        metrics: the file, one JSON object a line with "step" and numbers.
        out: the PNG to write.
    """
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
    """What there is to draw of a metrics.jsonl's records: title of PANELS -> name -> points (step, value)."""
    curves = {}
    for title, names in PANELS:
        found = {n: [(r["step"], r[n]) for r in records if isinstance(r.get(n), (int, float))] for n in names}
        if any(found.values()):
            curves[title] = {n: points for n, points in found.items() if points}
    return curves


def draw_curves(axis: Any, title: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Draw one panel: the lines of a title of `find_curves` into matplotlib's axis."""
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=LABELS[name], marker="." if len(points) < 30 else None, linewidth=1.2)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
