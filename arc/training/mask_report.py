"""The mask report: which tokens of a sample are learned, how long samples are, and how much there is to train."""

from __future__ import annotations

from typing import Any

import numpy as np

from arc.models.collator import InputMaskingDataCollator
from arc.runs.settings import RunSettings
from arc.training.data import StageData
from arc.training.stage import StageContext

ROWS = 32  # samples that the masks are computed of
BINS = 8  # of the histogram of lengths
BAR = 40  # characters of its longest bar


def report_masks(run: StageContext[RunSettings], data: StageData, collator: InputMaskingDataCollator) -> None:
    """Print one sample with its mask, the share of learned tokens, the lengths, and the steps of the training."""
    from rich.console import Console

    settings, count, lengths = run.settings, len(data.samples), data.samples.lengths()
    numbers = np.random.default_rng(settings.seed).permutation(count)[:ROWS]
    rows = data.samples.__getitems__(numbers.tolist())
    encoded = [collator.encode(row) for row in rows]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _print_sample(console, rows[0].get("key", "-"), *encoded[0], collator.tokenizer)
    share = sum(int(mask.sum()) for _, mask in encoded) / sum(len(mask) for _, mask in encoded)
    console.print(f"learned: {share:.1%} of the tokens ({len(rows)} samples looked at)")
    console.print(f"tokens a sample: mean {lengths.mean():.0f}, shortest {lengths.min()}, longest {lengths.max()}")
    counts, bounds = np.histogram(lengths, bins=min(BINS, max(1, len(np.unique(lengths)))))
    for rows_of_bin, low, high in zip(counts, bounds[:-1], bounds[1:], strict=True):
        bar = "█" * round(BAR * rows_of_bin / counts.max())
        console.print(f"  {low:6.0f} to {high:6.0f}  {bar} {rows_of_bin / len(lengths):.1%}")
    tokens, steps = float(lengths.mean()), data.steps(settings)
    epochs = steps / data.steps_per_epoch(settings) if settings.max_steps > 0 else settings.num_train_epochs
    console.print(
        f"an epoch: {count:,} samples, {tokens * count:,.0f} tokens; to train: {epochs:.3g} epochs, {steps:,} steps, "
        f"{tokens * count * epochs:,.0f} tokens"
    )
    shortened = data.samples.shortened()
    if shortened:
        print(f"shortened: {shortened:.1%} of the samples lose demonstrations to fit {settings.max_seq_length} tokens")


def _print_sample(console: Any, key: str, ids: np.ndarray, learned: np.ndarray, tokenizer: Any) -> None:
    from rich.text import Text

    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(ids)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        piece = tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        # Brackets as well as colours: a log file or a pipe shows the brackets, a terminal both.
        text.append(f"⟦{piece}⟧" if learned[begin] else piece, style="bold green" if learned[begin] else "dim")
    console.print(Text("One sample: ") + Text("⟦learned⟧", "bold green") + Text(" and ") + Text("masked", "dim"))
    console.print(f"key {key}")
    console.print(text)
