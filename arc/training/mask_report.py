"""The mask report: what of a batch is learned, shown in colours."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from arc.models.collator import InputMaskingDataCollator
from arc.runs.needs import format_duration
from arc.runs.processes import process_count
from arc.training.data import StageData
from arc.training.run import StageRun


def print_mask_report(
    rows: Sequence[dict[str, Any]],
    collator: InputMaskingDataCollator,
    *,
    lengths: np.ndarray,
    rows_per_epoch: int,
    epochs: float,
    seconds: float | None = None,
) -> None:
    """Print one row with what is learned and what is masked in two colours, and what an epoch holds.

    Args:
        rows: rows as the collator takes them; the first is shown, all are checked.
        collator: decides what is learned.
        lengths: token counts (rows,) of a sample of the epoch's rows.
        rows_per_epoch: how many rows an epoch has.
        epochs: how many epochs are trained (a part of one when steps are limited).
        seconds: estimated time of the training, if known.

    Raises:
        ValueError: a row that the collator refuses.
    """
    from rich.console import Console
    from rich.text import Text

    encoded = [collator.encode(row) for row in rows]
    ids, learned = encoded[0]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(ids)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        piece = collator.tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        # Underlined as well as coloured: a log file or a pipe shows the brackets, a terminal the colours.
        text.append(f"⟦{piece}⟧" if learned[begin] else piece, style="bold green" if learned[begin] else "dim")
    console.print(Text("One sample: ") + Text("⟦learned⟧", "bold green") + Text(" and ") + Text("masked", "dim"))
    console.print(f"key {rows[0].get('key', '-')}")
    console.print(text)
    share = sum(int(mask.sum()) for _, mask in encoded) / sum(len(mask) for _, mask in encoded)
    console.print(f"learned: {share:.1%} of the tokens ({len(rows)} samples looked at)")
    counts, bounds = np.histogram(lengths, bins=min(8, max(1, len(np.unique(lengths)))))
    console.print(f"tokens a sample: mean {lengths.mean():.0f}, shortest {lengths.min()}, longest {lengths.max()}")
    for count, low, high in zip(counts, bounds[:-1], bounds[1:], strict=True):
        console.print(
            f"  {low:6.0f} to {high:6.0f}  {'█' * round(40 * count / counts.max())} {count / len(lengths):.1%}"
        )
    tokens = float(lengths.mean()) * rows_per_epoch
    time = "" if seconds is None else f"; estimated time: {format_duration(seconds)} (rough)"
    console.print(f"an epoch: {rows_per_epoch:,} samples, {tokens:,.0f} tokens; to train: {epochs:.3g} epochs{time}")


def report_masks(run: StageRun, data: StageData, collator: InputMaskingDataCollator) -> None:
    """Print what is learned and how much there is; in a dry run, which measures nothing, also a guess at the time."""
    settings = run.settings
    lengths = data.samples.lengths()
    steps_per_epoch = math.ceil(len(data.samples) / settings.samples_per_step)
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps / steps_per_epoch
    tokens = float(lengths.mean()) * len(data.samples) * epochs
    seed_rows = np.random.default_rng(settings.seed).permutation(len(data.samples))[:32]
    rows = data.samples.__getitems__(seed_rows.tolist())
    seconds = estimate_seconds(run, tokens) / process_count() if settings.dry_run else None
    print_mask_report(rows, collator, lengths=lengths, rows_per_epoch=len(data.samples), epochs=epochs, seconds=seconds)
    shortened = data.samples.shortened()
    if shortened:
        print(f"shortened: {shortened:.1%} of the samples lose demonstrations to fit {settings.max_seq_length} tokens")


# Share of the machine's measured matrix rate that training reached; see benchmarks/README.md.
EFFICIENCY = {("unsloth", "cuda"): 0.12, ("transformers", "cuda"): 0.35, ("transformers", "cpu"): 0.35}


def estimate_seconds(run: StageRun, tokens: float) -> float:
    """Rough seconds for training on `tokens` tokens: 6 operations a parameter and token at a rate measured just now."""
    import torch
    from transformers import AutoConfig

    precision = run.precision
    config = AutoConfig.from_pretrained(str(run.parent), trust_remote_code=False)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * (hidden * hidden * 3 + 3 * hidden * config.intermediate_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 4096 if device == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=precision.torch_dtype)
    for _ in range(3):
        a @ a
    synchronise = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronise()
    begin = time.perf_counter()
    for _ in range(10):
        a @ a
    synchronise()
    rate = 10 * 2 * side**3 / (time.perf_counter() - begin)
    return 6 * parameters * tokens / (rate * EFFICIENCY[precision.engine, device])
