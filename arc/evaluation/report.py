"""The HTML report of an evaluation: one file that opens offline.

`report_template.html` has the style, the script and the frame. This module adds the figures as HTML, the plot as two
PNGs (for light and dark screens), and the grids as JSON, which the script draws.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlencode

from arc.puzzles.files import write_atomically

SCHEMA = 2  # of results.json
TEMPLATE = Path(__file__).with_name("report_template.html")
MEASURES = (
    ("exact_1", "Exact, one guess", "test inputs whose first guess is right in every cell"),
    ("exact_2", "Exact, two guesses", "test inputs of which one of two guesses is"),
    ("score", "Puzzles",
     "the competition's score: of each puzzle, the share of its test inputs that two guesses solve"),
    ("greedy", "Greedy", "test inputs whose greedy reply to the first view is right"),
    ("found", "Found", "test inputs with the right grid among the candidates: what a perfect rule would choose"),
    ("decodable", "Decodable", "test inputs whose greedy reply is a grid"),
    ("right_shape", "Right shape", "test inputs whose first guess has the rows and columns of the truth"),
    ("cell_accuracy", "Right cells", "of the first guess, mean over test inputs; none for a wrong shape"),
    ("prob_truth", "Probability of the truth", "as a reply to the first view, mean over test inputs"),
    ("prob_greedy", "Probability of the greedy reply",
     "mean over test inputs; of a model that knows what it knows about the share of right ones, Greedy"),
)  # fmt: skip
RULES = {
    "first_view": "first view",
    "max": "highest probability",
    "sum": "sum of probabilities",
    "product": "product over all views",
    "majority": "majority of views",
}
# Of the plot, in the template's two colour schemes: text, lines, one guess, two guesses.
PLOT_COLOURS = {
    "light": ("#1b1f24", "#d5dae1", "#8a5a00", "#0b5fb0"),
    "dark": ("#e8eaed", "#3a4048", "#f0b04a", "#6cb6ff"),
}
LABEL_LENGTH = 26  # longer names of models are shortened in the plot, and only there


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the content of results.json as one HTML file that opens offline, replacing an old one in one step.

    Names of models and puzzles may hold anything: they are escaped. A Content-Security-Policy allows only the
    template's own script, by its hash, and loads nothing.

    Raises:
        ValueError: the results have another schema, lack an entry, or hold something that is no grid.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    check_results(results)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": number, "sha256": _source_hash}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    text = environment.get_template(TEMPLATE.name).render(_page(results))
    # Names of folders that are not UTF-8 come as lone surrogates, which no file can hold.
    write_atomically(path, text.encode("utf-8", "replace"))


def check_results(results: dict[str, Any]) -> None:
    """Raise ValueError for results that the report cannot show."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"results of schema {results.get('schema')!r}, and the report reads {SCHEMA}: evaluate anew")
    if missing := [n for n in ("settings", "versions", "data", "models", "puzzles", "table") if n not in results]:
        raise ValueError(f"results without {', '.join(missing)}")
    if not results["models"]:
        raise ValueError("results of no model: nothing to report")
    if (columns := [row["model"] for row in results["table"]]) != list(results["models"]):
        raise ValueError(f"table of models {columns}: expected one row for each of {list(results['models'])}")


def percent(value: float | None, signed: bool = False) -> str:
    """A share as percent, e.g. "25.0%", or as a difference, e.g. "+3.0"; a dash for None."""
    if not _is_figure(value):
        return "–"
    if signed:
        return f"{100 * value:+.1f}".replace("-", "−")
    return "<0.1%" if 0 < value < 0.0005 else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    """A count, or seconds with three significant digits; a dash for None."""
    if not _is_figure(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def pack_grid(grid: Iterable[Iterable[int]]) -> str:
    """A grid as text: its number of columns, then all cells in order: [[1, 2], [3, 4]] is "2 1234".

    ValueError: no rows, rows of different lengths, or a cell that is not an integer 0..9.
    """
    rows = [[int(cell) if cell in range(10) else -1 for cell in row] for row in grid]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) or min(row) < 0 for row in rows):
        raise ValueError(f"not a grid: {str(rows)[:100]}: expected rows of one length, of integers 0..9")
    return f"{len(rows[0])} {''.join(str(cell) for row in rows for cell in row)}"


def plot_models(table: Sequence[dict[str, Any]], out: Any, scheme: str = "light") -> None:
    """Draw exact match of each model with one and two guesses, with 95% intervals, into a transparent PNG.

    `table` is that of the results, `out` a path or a stream, and `scheme` a key of `PLOT_COLOURS`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ink, lines, *colours = PLOT_COLOURS[scheme]
    figure = Figure(figsize=(5.2, 1.3 + 0.55 * len(table)), layout="constrained")
    axis = figure.subplots()
    series = (("exact_1", "one guess", "o", -0.14), ("exact_2", "two guesses", "s", 0.14))
    for (name, label, marker, shift), colour in zip(series, colours, strict=True):
        for row, result in enumerate(table):
            value = result.get(name)
            if not _is_figure(value):
                continue
            low, high = _interval(result, name) or (value, value)
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.errorbar(
                value, row + shift, xerr=errors, fmt=marker, color=colour, capsize=4, markersize=6, linewidth=1.8,
                label=None if label in axis.get_legend_handles_labels()[1] else label,
            )  # fmt: skip
    # Names are text, not formulas, whatever dollars they hold.
    axis.set_yticks(range(len(table)), [_label(row["model"]) for row in table], parse_math=False)
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_xlabel("solved exactly, 95% interval", color=ink)
    axis.tick_params(colors=ink, length=0)
    axis.grid(axis="x", color=lines)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(lines)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, labelcolor=ink)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn instead
        figure.savefig(out, dpi=200, format="png", transparent=True, metadata={"Software": None})


def _page(results: dict[str, Any]) -> dict[str, Any]:
    """The template's variables."""
    table, models, puzzles, data = results["table"], list(results["models"]), results["puzzles"], results["data"]
    scored = any(entry.get("solution") is not None for entry in puzzles.values())
    plots = {}
    if any(_is_figure(row.get(name)) for row in table for name in ("exact_1", "exact_2")):
        for scheme in PLOT_COLOURS:
            stream = io.BytesIO()
            plot_models(table, stream, scheme)
            plots[scheme] = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    answers = [entry[model] for entry in puzzles.values() for model in models if model in entry]
    choice = any(answer.get("candidates") not in (0, 1) for answer in answers)  # else there is nothing to rank
    measures = [
        (label, hint, [(row.get(name), _interval(row, name)) for row in table])
        for name, label, hint in MEASURES
        if any(_is_figure(row.get(name)) for row in table)
    ]
    return {
        "data": data,
        "leaked": _links(data["leaked"], puzzles),
        "seen_tests": _links(data.get("seen_tests") or (), puzzles),
        "excluded": _links(data.get("excluded") or (), puzzles),
        "unanswerable": {model: _links(names, puzzles) for model, names in data["unanswerable"].items() if names},
        "settings": _lines(results["settings"]),
        "versions": _lines(results["versions"]),
        "models": models,
        "table": [
            row | {"interval": _interval(row, "change"), "gained": row.get("gained"), "lost": row.get("lost")}
            for row in table
        ],
        "measures": measures,
        "rules": _rules((results.get("rules") if choice else None) or [], models),
        "plots": plots,
        "plot_text": "; ".join(
            f"{row['model']}: {percent(row.get('exact_1'))} with one guess, {percent(row.get('exact_2'))} with two"
            for row in table
        ),
        "scored": scored,
        "compared": scored and any(row.get("gained") is not None for row in table),
        "count": len(puzzles),
        "script_data": {"models": models, "puzzles": _script_puzzles(results)},
    }


def _script_puzzles(results: dict[str, Any]) -> list[dict[str, Any]]:
    changes = [  # for each model: test input -> gained or lost
        dict.fromkeys(row.get("lost") or (), "lost") | dict.fromkeys(row.get("gained") or (), "gained")
        for row in results["table"]
    ]
    puzzles = []
    for key, entry in results["puzzles"].items():
        try:
            puzzles.append(_script_puzzle(key, entry, results["models"], changes))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"puzzle {key!r}: {error!r}") from error
    return puzzles


def _script_puzzle(
    key: str, entry: dict[str, Any], models: Sequence[str], changes: Sequence[dict[str, str]]
) -> dict[str, Any]:
    """A test input for the template's script. `grids` lists each different grid once, the rest refers to it."""
    grids: dict[str, int] = {}

    def place(grid: Any) -> int:
        return grids.setdefault(pack_grid(grid), len(grids))

    solution = None if entry["solution"] is None else place(entry["solution"])
    answers: list[dict[str, Any] | None] = []
    for model, change in zip(models, changes, strict=True):
        answer = entry.get(model)
        if answer is None:
            answers.append(None)
            continue
        known = solution is not None and answer["correct"] is not None
        if known and len(answer["correct"]) != len(answer["guesses"]):
            raise ValueError(f"{model}: {len(answer['guesses'])} guesses, but {len(answer['correct'])} are judged")
        answers.append({
            "guesses": [place(grid) for grid in answer["guesses"]],
            "correct": [bool(right) for right in answer["correct"]] if known else None,
            "change": change.get(key) or change.get(entry["puzzle"]),
            "candidates": answer["candidates"],
            "found": answer["found"] if known else None,
            "prob": percent(answer["prob_truth"]) if _is_figure(answer["prob_truth"]) else None,
            "greedy": "none" if answer["greedy"] is None else answer["greedy_correct"] if known else None,
            "asked": answer["views"] > 0,
        })  # fmt: skip
    return {
        "id": key,
        "puzzle": entry["puzzle"],
        "leaked": bool(entry["leaked"]),
        "train": [[place(grid) for grid in pair] for pair in entry["train"]],
        "input": place(entry["input"]),
        "solution": solution,
        "answers": answers,
        "grids": list(grids),
    }


def _rules(rules: Sequence[dict[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    """The table of selection rules: rows of (label, each model's figures), and each model's share of "found"."""
    by_model = {row["model"]: row for row in rules}
    rows = [by_model.get(model, {}) for model in models]
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, dict)))
    shown = [(RULES.get(name, name), [row.get(name) or {} for row in rows]) for name in names]
    figures = [figure for _, cells in shown for cell in cells for figure in cell.values()]
    return {"rows": shown if any(map(_is_figure, figures)) else [], "found": [row.get("found") for row in rows]}


def _links(names: Iterable[str], puzzles: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Names of puzzles or test inputs, each with the URL fragment that shows it; None: not in the report."""
    known = set(puzzles) | {entry["puzzle"] for entry in puzzles.values()}
    return [(name, urlencode({"puzzle": name}, errors="replace") if name in known else None) for name in names]


def _lines(values: dict[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return [(name, text(value)) for name, value in values.items()]


def _interval(row: dict[str, Any], name: str) -> tuple[float, float] | None:
    bounds = row.get(f"{name}_interval")
    return tuple(bounds) if bounds is not None and all(map(_is_figure, bounds)) else None


def _is_figure(value: Any) -> TypeGuard[float]:
    """Whether a value is a number to show: neither None nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _label(name: str) -> str:
    """A name for the plot: printable, and shortened in the middle, where names differ least."""
    name = re.sub(r"\s", " ", "".join(c if c.isprintable() else " " for c in name))
    half = LABEL_LENGTH // 2
    return name if len(name) <= LABEL_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def _source_hash(text: str) -> str:
    """The Content-Security-Policy source that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
