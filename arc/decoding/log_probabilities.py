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
    """Compute float32 products in float32: TF32, which Unsloth turns on for training, has only 10 bits."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def unsloth_logits(engine: str) -> Iterator[None]:
    """Have Unsloth's forward pass return logits, which it does only on request."""
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
    """Log probabilities of the token after each position, int (positions,) ascending, of a row, (tokens,).

    Returns:
        Natural logarithms, float64 (positions, vocabulary), on the CPU.
    """
    with decoding(model, engine), unsloth_logits(engine):
        return log_probabilities_of_rows(model, [row], [positions], engine)[0]


def log_probabilities_of_rows(
    model: Any, rows: Sequence[np.ndarray], positions: Sequence[np.ndarray], engine: str = "transformers"
) -> list[torch.Tensor]:
    """`log_probabilities` of several rows, for a model that is switched to decoding: one tensor a row.

    Padding is on the right, where no token attends to it, so Unsloth gets no mask, as in training. Transformers
    computes logits only where they are wanted: those of a whole vocabulary take gigabytes.
    """
    import torch

    results: dict[int, torch.Tensor] = {}
    device, vocabulary = model.get_input_embeddings().weight.device, model.config.vocab_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size = min(16, max(1, LOGIT_BYTES // (4 * vocabulary * max(len(row) for row in rows))))
    with torch.no_grad(), full_float32():
        for first in range(0, len(rows), size):
            batch = order[first : first + size]
            ids = np.zeros((len(batch), max(len(rows[i]) for i in batch)), dtype=np.int64)
            mask = np.zeros_like(ids)
            for at, i in enumerate(batch):
                ids[at, : len(rows[i])], mask[at, : len(rows[i])] = rows[i], 1
            columns = np.unique(np.concatenate([positions[i] for i in batch]))
            if engine == "unsloth":
                columns, options = np.arange(ids.shape[1]), {}
            else:
                to_keep = torch.from_numpy(columns).to(device)
                options = {"attention_mask": torch.from_numpy(mask).to(device), "logits_to_keep": to_keep}
            logits = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **options).logits
            for at, i in enumerate(batch):
                chosen = torch.from_numpy(np.searchsorted(columns, positions[i])).to(device)
                results[i] = torch.log_softmax(logits[at, chosen].double(), -1).cpu()
    return [results[i] for i in range(len(rows))]
