"""The progress bar of an evaluation: it counts the rows of all puzzles and models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


def solved_of(solved: int, judged: int) -> str:
    """A score as the progress shows it."""
    return f"solved {solved} of {judged} ({solved / judged:.1%})"


class Progress:
    """A bar of finished rows. It estimates the time left from the mean time of computed rows.

    Rows that took no time (from the cache, or views that do not fit) count as finished, but not for the estimate.
    """

    def __init__(self, rows: int):
        from tqdm import tqdm

        # smoothing 0: the mean over all rows, because rows of one batch finish together.
        self.bar: Any = tqdm(total=rows, unit="row", dynamic_ncols=True, smoothing=0, miniters=1)

    def finished(self, rows: int = 1) -> None:
        """Count rows that were computed."""
        self.bar.update(rows)

    def skipped(self, rows: int = 1) -> None:
        """Count rows that took no time."""
        self.bar.initial += rows
        self.bar.update(rows)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block, such as loading a model, from the estimate."""
        begin = time.time()
        yield
        self.bar.start_t += time.time() - begin

    def describe(self, model: str, solved: int = 0, judged: int = 0) -> None:
        """Show the model, and how many of the judged test inputs it has solved so far."""
        self.bar.set_description_str(model, refresh=False)
        self.bar.set_postfix_str(solved_of(solved, judged) if judged else "", refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.write(line)

    def close(self) -> None:
        """Leave the bar as it is now."""
        self.bar.close()
