"""The probe: answers of the model as it was trained, recorded beside its adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.greedy import generate_replies
from arc.decoding.log_probabilities import log_probabilities_of_rows, unsloth_logits
from arc.models.loading import decoding
from arc.models.manifests import apply_umask
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.text import format_options

if TYPE_CHECKING:
    import torch


PROBE = "probe.safetensors"
PROBE_POSITIONS = 32  # of each row, at most
PROBE_BYTES = 15 * 2**20  # of its log probabilities
# Operations that one pass over the probe may take: about 20 s in float32 on a slow machine of its kind.
PROBE_OPERATIONS = {"cuda": 2e14, "cpu": 1e12}


@dataclass(frozen=True)
class Probe:
    """Rows, the positions of them that are looked at, and what a trained model answered there.

    Attributes:
        rows: token ids, int64 (tokens,) each.
        prompt_lengths: tokens before the last reply, int64 (rows,).
        positions: int64 (rows, positions); position t is where token t + 1 is predicted.
        log_probabilities: of the next token as the model was trained, float32 (rows, positions, vocabulary); None where
            no trained model was asked.
        greedy: its greedy replies to the first rows' prompts, int64 (tokens,) each, end token included.
    """

    rows: list[np.ndarray]
    prompt_lengths: np.ndarray
    positions: np.ndarray
    log_probabilities: torch.Tensor | None = None
    greedy: Sequence[np.ndarray] = ()


def record_probe(
    model: Any,
    engine: str,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    path: str | Path,
    *,
    greedy_rows: int = 16,
) -> None:
    """Record the answers of a trained model while it is still in memory.

    The number of rows is limited to about 20 s of a slow machine and 16 MB. With a whole vocabulary of 128k entries
    these are 7 rows of 4 positions. The random state is neither used nor changed.

    Args:
        model: the trained model, of any engine, in training or not.
        engine: "unsloth" or "transformers".
        tokenizer: the one that it was trained with.
        rows: held-out rows with their replies, as `SampleEncoder.encode` gives them.
        path: the file to write, `PROBE` in the adapter's folder.
        greedy_rows: greedy replies to at most this many of the first rows' prompts are recorded too.

    Raises:
        ValueError: no rows, or a row without a reply.
    """
    import torch
    from safetensors.torch import save_file

    probe = plan_probe(rows, model, model.config.vocab_size)
    with decoding(model, engine), unsloth_logits(engine):
        answers = probe_answers(model, probe, engine)
    count, longest = affordable_replies(model, probe, greedy_rows)
    prompts = [row[:length] for row, length in zip(probe.rows, probe.prompt_lengths, strict=True)][:count]
    replies = generate_replies(model, engine, tokenizer, prompts, longest) if prompts else []
    save_file(
        {
            "input_ids": torch.from_numpy(np.concatenate(probe.rows)),
            "row_ends": torch.from_numpy(np.cumsum([len(row) for row in probe.rows])),
            "prompt_lengths": torch.from_numpy(probe.prompt_lengths),
            "positions": torch.from_numpy(probe.positions),
            "log_probabilities": answers.float(),
            "greedy_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *replies])),
            "greedy_ends": torch.from_numpy(np.cumsum([len(reply) for reply in replies], dtype=np.int64)),
        },
        str(path),
        metadata={"keys": json.dumps([str(row.get("key")) for row in rows[: len(probe.rows)]])},
    )
    apply_umask(path)


def read_probe(folder: str | Path) -> Probe | None:
    """The probe of an adapter's folder, or None if none was recorded.

    Raises:
        ValueError: it is there and cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / PROBE
    if not path.is_file():
        return None
    try:
        stored = load_file(str(path))
        rows, replies = (
            np.split(stored[f"{name}_ids"].numpy(), stored[f"{ends}_ends"].numpy())[:-1]
            for name, ends in (("input", "row"), ("greedy", "greedy"))
        )
        return Probe(
            rows,
            stored["prompt_lengths"].numpy(),
            stored["positions"].numpy(),
            stored["log_probabilities"],
            replies,
        )
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): train again, or move it aside") from None


def make_probe_rows(tokenizer: Any) -> list[dict[str, Any]]:
    """A few puzzles in the text format, always the same, for adapters that have no probe.

    Args:
        tokenizer: a tokenizer with an end token.

    Returns:
        Rows with their replies, as `SampleEncoder.encode` gives them.
    """
    rng = np.random.default_rng(0)
    challenge = {}
    for number in range(16):
        inputs = [rng.integers(0, 10, size=rng.integers(3, 7, size=2)) for _ in range(4)]
        pairs = [{"input": grid, "output": np.rot90(grid, number % 4)} for grid in inputs]
        challenge[f"probe{number:02d}"] = {"train": pairs[:3], "test": pairs[3:]}
    puzzles = ArcDataset(challenge)
    return SampleEncoder(tokenizer, **format_options(tokenizer.eos_token)).encode(puzzles, puzzles.keys)


def plan_probe(rows: Sequence[dict[str, Any]], model: Any, vocabulary: int) -> Probe:
    """Choose the rows of a probe and their positions, by a fixed rule.

    Three quarters of the positions are spread over the last reply, the others over all tokens before it.

    Args:
        rows: rows with their replies; the first ones are taken, one at least.
        model: its size and device decide how many.
        vocabulary: entries of an answer.

    Raises:
        ValueError: no rows, or a row without a reply.
    """
    if not rows:
        raise ValueError("there are no rows to ask the model: expected at least one held-out row with its reply")
    for row in rows:
        if not len(row["reply_spans"]):
            raise ValueError(f"row {row.get('key')} has no reply: expected rows as encoded with their replies")
    ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
    fitting = max(1, PROBE_BYTES // (4 * vocabulary))  # positions of all rows together
    positions = min(PROBE_POSITIONS, fitting, max(4, fitting // len(rows)))
    count = min(affordable_probe_rows(ids, model), fitting // positions)
    spans = [row["reply_spans"][-1] for row in rows[:count]]
    chosen = [_spread(int(begin), int(end), positions) for begin, end in spans]
    return Probe(ids[:count], np.array([begin for begin, _ in spans], dtype=np.int64), np.stack(chosen))


def _spread(begin: int, end: int, count: int) -> np.ndarray:
    # Positions that predict the reply [begin, end), and positions before them. No two are the same in a row that has
    # `count` tokens.
    inside = min(count - count // 4, end - begin)
    before = np.linspace(0, max(begin - 2, 0), count - inside)
    return np.concatenate([before, np.linspace(begin - 1, end - 2, inside)]).round().astype(np.int64)


def _operations(model: Any) -> tuple[float, float]:
    # Operations of one token, and how many one pass over the probe may take.
    kind = "cuda" if model.get_input_embeddings().weight.is_cuda else "cpu"
    return 2 * sum(p.numel() for p in model.parameters()), PROBE_OPERATIONS[kind]


def affordable_probe_rows(rows: Sequence[np.ndarray], model: Any) -> int:
    """How many of the first rows one pass over the probe may hold, by `PROBE_OPERATIONS`; at least one.

    Args:
        rows: token ids.
        model: its size and device decide.
    """
    each, budget = _operations(model)
    costs = each * np.cumsum([len(row) for row in rows])
    return max(1, int(np.searchsorted(costs, budget, side="right")))


def affordable_replies(model: Any, probe: Probe, most: int) -> tuple[int, int]:
    """How many greedy replies cost no more than a pass over the probe, and their longest length in tokens.

    Args:
        model: its size and device decide.
        probe: its first prompts are answered.
        most: replies.
    """
    # A step of decoding reads all weights for few tokens: it takes about as long as 64 tokens of a prompt, whatever the
    # batch.
    each, budget = _operations(model)
    longest = max(len(row) - length for row, length in zip(probe.rows, probe.prompt_lengths, strict=True))
    for count in range(min(most, len(probe.rows)), 0, -1):
        if each * (probe.prompt_lengths[:count].sum() + 64 * longest * math.ceil(count / 8)) <= budget:
            return count, int(longest)
    return 0, int(longest)


def probe_answers(model: Any, probe: Probe, engine: str = "transformers") -> torch.Tensor:
    """Log probabilities at the probe's positions, float64 (rows, positions, vocabulary), on the CPU."""
    import torch

    return torch.stack(log_probabilities_of_rows(model, probe.rows, list(probe.positions), engine))
