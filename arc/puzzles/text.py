"""Text: how a puzzle is written for a model, and where its replies stand in it."""

from __future__ import annotations

import numpy as np

from arc.puzzles.files import MAX_SIDE


def format_options(eos_token: str) -> dict[str, str]:
    """The text format: one token per cell once the vocabulary is cut.

    Args:
        eos_token: the tokenizer's end token; every reply ends with it.

    Returns:
        Keyword arguments for `ArcDataset.get_task`, `SampleEncoder` and the like. The preprompt leaves out I and O,
        which mark inputs and outputs.

    Source: the published recipe of the ARChitects.
    """
    return {
        "preprompt": "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz",
        "query_beg": "I",
        "reply_beg": "\n+/-=O",
        "reply_end": "\n" + eos_token,
        "lines_sep": "\n",
    }


def find_reply_spans(text: str, reply_beg: str, reply_end: str) -> list[tuple[int, int]]:
    """Where the replies of a formatted text are.

    Args:
        text: formatted puzzles.
        reply_beg: what stands before each reply.
        reply_end: what each reply ends with; part of its span.

    Returns:
        Character spans (start, end) of the replies, demonstrations' included. A text that ends with `reply_beg` is a
        prompt: the reply that it asks for has no span.

    Raises:
        ValueError: the text is cut in the middle of a reply, or `reply_beg` or `reply_end` is empty.
    """
    if not reply_beg or not reply_end:
        raise ValueError(
            f"found reply_beg {reply_beg!r} and reply_end {reply_end!r}: expected text in both to search for"
        )
    spans, position = [], 0
    while (begin := text.find(reply_beg, position)) >= 0:
        begin += len(reply_beg)
        if begin == len(text):
            break
        end = text.find(reply_end, begin)
        if end < 0:
            raise ValueError(
                f"the text is cut in the middle of a reply: the one from character {begin} on has no {reply_end!r}"
            )
        position = end + len(reply_end)
        spans.append((begin, position))
    return spans


def does_not_fit(key: str, tokens: int, max_tokens: int) -> ValueError:
    """The error for a view that is too long even with one demonstration."""
    return ValueError(
        f"key {key!r}: {tokens:,} tokens with one demonstration, expected at most {max_tokens:,}: raise the limit or "
        "leave the puzzle out"
    )


def can_become_grid(text: str, lines_sep: str) -> bool:
    """Whether a reply that begins like this can still be one that `ArcDataset.decode` reads.

    Args:
        text: the reply so far, without its end.
        lines_sep: what stands between rows, one character.
    """
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
    """Share of right cells; 0 for no guess or one of another shape."""
    if guess is None or guess.shape != solution.shape:
        return 0.0
    return float(np.mean(guess == solution))
