"""Text: how a puzzle is written for a model, and how a reply is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from arc.puzzles.grids import MAX_SIDE, GridStore, check_grid
from arc.puzzles.keys import View, transform_grid


def format_options(eos_token: str) -> dict[str, str]:
    """The text format of the ARChitects' published recipe, as keyword arguments for `ArcDataset.get_task` and the like.

    A reply ends with `eos_token`, the tokenizer's end token. The preprompt leaves out I and O, which mark inputs and
    outputs. Once the vocabulary is cut, each cell is one token.
    """
    return {
        "preprompt": "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz",
        "query_beg": "I",
        "reply_beg": "\n+/-=O",
        "reply_end": "\n" + eos_token,
        "lines_sep": "\n",
    }


def find_reply_spans(text: str, reply_beg: str, reply_end: str) -> list[tuple[int, int]]:
    """Character spans (start, end) of the replies in a text, demonstrations' and `reply_end` included.

    A text that ends with `reply_beg` is a prompt: the missing reply has no span.

    Raises:
        ValueError: the text is cut in the middle of a reply, or `reply_beg` or `reply_end` is empty.
    """
    if not reply_beg or not reply_end:
        raise ValueError(f"found reply_beg {reply_beg!r} and reply_end {reply_end!r}: expected text in both")
    spans, position = [], 0
    while (begin := text.find(reply_beg, position)) >= 0:
        begin += len(reply_beg)
        if begin == len(text):
            break
        end = text.find(reply_end, begin)
        if end < 0:
            raise ValueError(f"the text is cut in the middle of a reply: no {reply_end!r} after character {begin}")
        position = end + len(reply_end)
        spans.append((begin, position))
    return spans


def format_grid(grid: Any, lines_sep: str, transforms: Sequence[str] = ()) -> str:
    """The rows of digits of a grid (height, width), after the transforms of a key."""
    grid = transform_grid(grid, transforms)
    return lines_sep.join(row.tobytes().decode("ascii") for row in grid.astype(np.uint8) + 48)


def format_pairs(
    pairs: Iterable[Mapping[str, Any]], query_beg: str, reply_beg: str, reply_end: str, **options: Any
) -> str:
    """Demonstrations one after another; `options` are those of `format_grid`."""
    texts = []
    for pair in pairs:
        texts += [query_beg, format_grid(pair["input"], **options)]
        texts += [reply_beg, format_grid(pair["output"], **options), reply_end]
    return "".join(texts)


def format_view(
    key: str, view: View, store: GridStore,
    preprompt: str, query_beg: str, reply_beg: str, reply_end: str, lines_sep: str, reply: Any = True,
) -> dict[str, str]:  # fmt: skip
    """See `ArcDataset.fmt_task`. `view` is the resolved `key`; `store` holds its grids."""
    if reply is True:
        reply = store.grid(view.solution) if view.solution >= 0 else None
    elif reply is not None and view.query < 0:
        raise ValueError(f"key {key!r} names no test input that could have a reply, expected PUZZLE_INDEX")
    elif reply is not None:
        reply = check_grid(reply, f"key {key!r}, reply")
    options: dict[str, Any] = {"lines_sep": lines_sep, "transforms": key.split(".")[1:]}
    pairs = format_pairs([view.train[i] for i in view.order], query_beg, reply_beg, reply_end, **options)
    task = {"key": key, "train": preprompt + pairs, "query": "", "input": ""}
    if view.query >= 0:
        task["query"] = query_beg + format_grid(store.grid(view.query), **options) + reply_beg
        task["input"] = task["train"] + task["query"]
    task["text"] = task["train"]
    if reply is not None:
        task["reply"] = format_grid(reply, **options) + reply_end
        task["text"] = task["input"] + task["reply"]
    return task


def count_tokens(text: str, tokenizer: Any = None) -> int:
    """Number of tokens of a text, without BOS.

    Without a tokenizer, characters count, each `<...>` as one. That is right for the cut vocabulary only.

    Source: ARChitects' count_tokens, which counts characters only.
    """
    if tokenizer is not None:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return len(re.sub("<[^<]*>", "x", text))


def does_not_fit(key: str, tokens: int, max_tokens: int) -> ValueError:
    """The error for a view that is too long even with one demonstration."""
    return ValueError(
        f"key {key!r}: {tokens:,} tokens with one demonstration, expected at most {max_tokens:,}: raise the limit or "
        "leave the puzzle out"
    )


def parse_grid(text: str, lines_sep: str, reply_end: str | None = None) -> tuple[np.ndarray | None, str]:
    """Read a grid from a reply, strictly; see `ArcDataset.decode`, also for its errors.

    Returns:
        The grid, uint8 (height, width), and ""; or None and the reason.
    """
    if not lines_sep:
        raise ValueError("lines_sep is empty, expected what stands between rows")
    if reply_end == "":
        raise ValueError("reply_end is empty, expected what ends a reply, or None")
    ended = False  # whether `reply_end` begins with the line end that may follow the last row
    if reply_end is not None:
        text, end, _ = text.partition(reply_end)
        if not end:
            return None, "no end of reply"
        ended = reply_end.startswith(lines_sep)
    rows = text.split(lines_sep)
    if len(rows) > 1 and not rows[-1] and not ended:
        rows.pop()
    if len(rows) > MAX_SIDE or len(rows[0]) > MAX_SIDE:
        return None, f"more than {MAX_SIDE} rows or columns"
    for number, row in enumerate(rows, 1):
        if not row:
            return None, f"row {number} is empty"
        if not (row.isascii() and row.isdigit()):
            return None, f"row {number} has something else than digits"
        if len(row) != len(rows[0]):
            return None, f"row {number} has another length than row 1"
    return (np.frombuffer("".join(rows).encode("ascii"), dtype=np.uint8) - 48).reshape(len(rows), -1), ""


def can_become_grid(text: str, lines_sep: str) -> bool:
    """Whether a reply that begins with `text`, without its end, can still be a grid. `lines_sep` is one character."""
    *rows, last = text.split(lines_sep)
    width = len(rows[0]) if rows else MAX_SIDE
    return (
        len(rows) + bool(last) <= MAX_SIDE
        and len(last) <= width <= MAX_SIDE
        and all(len(row) == width for row in rows)
        and (not rows or width > 0)
        and all(not row or (row.isascii() and row.isdigit()) for row in (*rows, last))
    )


def cell_accuracy(guess: np.ndarray | None, solution: np.ndarray) -> float:
    """Share of right cells; 0 without a guess or for another shape."""
    if guess is None or guess.shape != solution.shape:
        return 0.0
    return float(np.mean(guess == solution))
