"""Log probabilities of a model at chosen positions of a row."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.loading import decoding

if TYPE_CHECKING:
    import torch


LOGIT_BYTES = 2**27  # of a batch's logits


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    # Whoever has asked for TF32 products (Unsloth does) asked for speed in training: 10 bits are too few for a sum that
    # is to be rounded once.
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def unsloth_logits(engine: str) -> Iterator[None]:
    # Unsloth's forward pass returns no logits unless it is asked for them.
    name = "UNSLOTH_RETURN_LOGITS"
    before = os.environ.get(name)
    if engine == "unsloth":
        os.environ[name] = "1"
    try:
        yield
    finally:
        if engine == "unsloth":
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def log_probabilities(model: Any, engine: str, row: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """What a model, in training or not, gives for the token after each of these positions of a row.

    Args:
        model: of any engine.
        engine: "unsloth" or "transformers".
        row: token ids (tokens,).
        positions: rising, int (positions,).

    Returns:
        Natural logarithms, float64 (positions, vocabulary), on the CPU.
    """
    with decoding(model, engine), unsloth_logits(engine):
        return log_probabilities_of_rows(model, [row], [positions], engine)[0]


def log_probabilities_of_rows(
    model: Any, rows: Sequence[np.ndarray], wanted: Sequence[np.ndarray], engine: str = "transformers"
) -> list[torch.Tensor]:
    # float64 (positions, vocabulary) of each row. Padding is on the right, where no token of a row can see it: Unsloth
    # is given no mask, as in training. Plain transformers applies the head only where it is needed (a whole
    # vocabulary's logits take gigabytes).
    import torch

    found: list[torch.Tensor | None] = [None] * len(rows)
    device, vocabulary = model.get_input_embeddings().weight.device, model.config.vocab_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    largest = max(1, LOGIT_BYTES // (4 * vocabulary * max(len(row) for row in rows)))
    size = min(16, largest)
    with torch.no_grad(), full_float32():
        for first in range(0, len(rows), size):
            batch = order[first : first + size]
            ids = np.zeros((len(batch), max(len(rows[i]) for i in batch)), dtype=np.int64)
            mask = np.zeros_like(ids)
            for at, i in enumerate(batch):
                ids[at, : len(rows[i])], mask[at, : len(rows[i])] = rows[i], 1
            kept = np.unique(np.concatenate([wanted[i] for i in batch]))
            if engine == "unsloth":
                kept, options = np.arange(ids.shape[1]), {}
            else:
                to_keep = torch.from_numpy(kept).to(device)
                options = {"attention_mask": torch.from_numpy(mask).to(device), "logits_to_keep": to_keep}
            logits = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **options).logits
            for at, i in enumerate(batch):
                rows_of_logits = torch.from_numpy(np.searchsorted(kept, wanted[i])).to(device)
                found[i] = torch.log_softmax(logits[at, rows_of_logits].double(), -1).cpu()
    return [log_probabilities for log_probabilities in found if log_probabilities is not None]
