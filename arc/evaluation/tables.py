"""The tables of an evaluation, as the terminal shows them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from arc.evaluation.selection import RULES

TITLES = {
    "exact_1": "exact, one guess",
    "exact_2": "exact, two guesses",
    "score": "puzzles (score)",
    "greedy": "exact, greedy",
    "decodable": "greedy is a grid",
    "right_shape": "right shape",
    "cell_accuracy": "right cells",
    "prob_truth": "P(truth)",
    "prob_greedy": "P(greedy)",
    "found": "truth found",
}


def print_tables(results: dict[str, Any]) -> None:
    """Print the scores and the selection rules. Four models fit into 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def make(title: str) -> Table:
        table = Table(title=title, caption=f"models: {prefix}..." if prefix else None, box=box.SIMPLE_HEAD)
        table.pad_edge = table.show_edge = False
        table.add_column("", no_wrap=True)
        for name in results["models"]:
            table.add_column(name[len(prefix) :], justify="right", overflow="fold")
        return table

    # What all names begin with, up to a hyphen, such as "Llama-3.2-1B-".
    prefix = os.path.commonprefix(list(results["models"])) if len(results["models"]) > 1 else ""
    prefix = prefix[: prefix.rfind("-") + 1]
    rows, n = results["table"], results["data"]["test_inputs"]
    known = rows[0]["n"]
    judged = f"{n:,} test inputs" if known in (0, n) else f"{known:,} of {n:,} test inputs, those with a solution"
    table = make(f"{results['data']['source']}: {judged}, with 95% intervals")
    for name, title in TITLES.items():
        table.add_row(title, *(_share(row[name], row[f"{name}_interval"]) for row in rows))
    changes = ("-" if r["change"] is None else _share(r["change"], r["change_interval"], "+.1%") for r in rows)
    table.add_row("change, two guesses", *changes)
    gains = ("-" if r["gained"] is None else f"{len(r['gained'])}, {len(r['lost'])}" for r in rows)
    table.add_row("gained, lost", *gains)
    table.add_row("seconds", *(f"{row['seconds']:,.1f}" for row in rows))
    rules = make("selection rules: one guess, two guesses")
    rules.add_row("truth found", *(_share(row["found"]) for row in results["rules"]))
    for rule in RULES:
        figures = [row[rule] for row in results["rules"]]
        rules.add_row(rule, *(f"{_share(row['exact_1'])}, {_share(row['exact_2'])}" for row in figures))
    # Names are text, whatever brackets and colons they hold.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print()
    for shown in (table, rules):
        console.print(shown)
        console.print()


def _share(value: float | None, interval: Sequence[float] | None = None, form: str = ".1%") -> str:
    if value is None:
        return "-"
    bounds = "" if interval is None else f"\n{100 * interval[0]:.1f}..{100 * interval[1]:.1f}"
    return f"{value:{form}}{bounds}"
