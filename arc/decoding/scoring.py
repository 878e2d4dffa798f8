"""Log probabilities of given replies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from arc.decoding.rows import (
    MASK_STEP,
    Work,
    affordable_rows,
    check_generation_settings,
    check_numbers,
    check_tokens,
    halve_on_out_of_memory,
    row_attention,
)
from arc.models.loading import decoding
from arc.models.prompt_sharing import round_up


def score_replies(
    model: Any, engine: str, tokenizer: Any, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray], *,
    batch_size: int = 8, work: Work | None = None,
) -> list[float]:  # fmt: skip
    """Log probabilities of given replies after given prompts.

    Replies to the same prompt follow it in one row, each blind to the others. Unsloth's fast path takes no such mask,
    so there each reply has a row with its prompt.

    Args:
        model, engine, tokenizer, work: see `search.search_replies`; any engine.
        prompts: token ids (tokens,), one for each reply; equal prompts are computed once.
        replies: token ids (tokens,); an end token counts only where it is there.
        batch_size: rows of one pass.

    Returns:
        Natural logarithms, in the replies' order.

    Raises:
        ValueError: not as many prompts as replies, an empty one, or a model that cannot be decoded here.
        torch.OutOfMemoryError: not even one row fits.
    """
    if len(prompts) != len(replies):
        raise ValueError(f"found {len(prompts)} prompts for {len(replies)} replies")
    check_generation_settings(1, batch_size)
    check_tokens(model, "prompt", prompts)
    check_tokens(model, "reply", replies)
    alone = engine == "unsloth"
    waiting = sorted(_pack(prompts, replies, alone), key=lambda row: -row.length)
    scores = [math.nan] * len(replies)
    work = work or Work()

    def run(size: int) -> None:
        while waiting:
            batch = waiting[:size]
            width = batch[0].length  # the longest
            logits = width if alone else max(row.reply_length for row in batch)
            batch = batch[: affordable_rows(size, model, logits, None if alone else (width, width))]
            for number, score in _score_alone(model, batch) if alone else _score_packed(model, batch):
                scores[number] = score
            work.passes += 1
            work.prompt_tokens += sum(len(row.prompt) for row in batch)
            work.reply_tokens += sum(row.reply_length for row in batch)
            del waiting[: len(batch)]

    attention = contextlib.nullcontext() if alone else row_attention(model)
    with decoding(model, engine), attention:
        halve_on_out_of_memory(run, batch_size, work)
    check_numbers(scores)
    return scores


class _Row:
    # A prompt and replies to it, which stand in one row.

    def __init__(self, prompt: np.ndarray):
        self.prompt = np.asarray(prompt)
        self.replies: list[tuple[int, np.ndarray]] = []  # with their numbers

    @property
    def reply_length(self) -> int:
        return sum(len(reply) for _, reply in self.replies)

    @property
    def length(self) -> int:
        return len(self.prompt) - 1 + self.reply_length


def _pack(prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray], alone: bool) -> list[_Row]:
    groups: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(np.asarray(prompt, dtype=np.int64).tobytes(), []).append(number)
    rows: list[_Row] = []
    for members in groups.values():
        # Attention grows with the square of a row: beyond twice the prompt, another row costs less.
        limit = 0 if alone else len(prompts[members[0]])
        row = None
        for number in sorted(members, key=lambda number: len(replies[number])):
            if row is None or row.reply_length + len(replies[number]) > limit:
                row = _Row(prompts[number])
                rows.append(row)
            row.replies.append((number, replies[number]))
    return rows


def _score_packed(model: Any, batch: Sequence[_Row]) -> Iterator[tuple[int, float]]:
    # A row is padding, the prompt without its last token, and for each reply that last token and the reply without its
    # last token. Replies end at the right border, so that all rows want logits of the same columns.
    import torch

    width = round_up(max(row.length for row in batch), MASK_STEP)
    scored = max(row.reply_length for row in batch)  # columns with logits, the last ones
    ids, positions, document = (np.zeros((len(batch), width), dtype=np.int64) for _ in range(3))
    targets = np.zeros((len(batch), scored), dtype=np.int64)
    document -= 1  # -1: padding, 0: the prompt, 1 and so on: the replies
    for at, row in enumerate(batch):
        begin, shared = width - row.length, len(row.prompt) - 1
        end = begin + shared
        ids[at, begin:end], positions[at, begin:end], document[at, begin:end] = row.prompt[:-1], np.arange(shared), 0
        for number, (_, reply) in enumerate(row.replies, 1):
            begin, end = end, end + len(reply)
            ids[at, begin], ids[at, begin + 1 : end] = row.prompt[-1], reply[:-1]
            positions[at, begin:end] = np.arange(shared, shared + len(reply))
            document[at, begin:end] = number
            targets[at, begin - width + scored : end - width + scored] = reply
    device = model.get_input_embeddings().weight.device
    tokens, places, documents, chosen = (torch.from_numpy(a).to(device) for a in (ids, positions, document, targets))
    columns = torch.arange(width, device=device)
    mask = (documents[:, None, :] == 0) | (documents[:, None, :] == documents[:, :, None])
    mask &= columns[None, :] <= columns[:, None]
    logits = model(
        input_ids=tokens, position_ids=places, attention_mask=mask[:, None], use_cache=False, logits_to_keep=scored
    ).logits
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float64).gather(-1, chosen[..., None])[..., 0].cpu().numpy()
    for at, row in enumerate(batch):
        begin = scored - row.reply_length
        for number, reply in row.replies:
            yield number, float(log_probs[at, begin : begin + len(reply)].sum())
            begin += len(reply)


def _score_alone(model: Any, batch: Sequence[_Row]) -> Iterator[tuple[int, float]]:
    # Padding is on the right, where no token attends to it: no mask is needed, and Unsloth takes none.
    import torch

    rows = [np.concatenate([row.prompt, row.replies[0][1]]) for row in batch]
    ids = np.zeros((len(batch), max(len(row) for row in rows)), dtype=np.int64)
    for at, tokens in enumerate(rows):
        ids[at, : len(tokens)] = tokens
    fed = torch.from_numpy(ids).to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=fed[:, :-1], use_cache=False).logits
    for at, row in enumerate(batch):
        first, last = len(row.prompt) - 1, len(rows[at]) - 1
        log_probs = torch.log_softmax(logits[at, first:last], -1, dtype=torch.float64)
        yield row.replies[0][0], float(log_probs.gather(-1, fed[at, first + 1 : last + 1, None]).sum())
