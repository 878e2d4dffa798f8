"""Log probabilities of replies that are given."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from arc.decoding.rows import (
    MASK_STEP,
    Work,
    affordable_masks,
    affordable_rows,
    check_generation_settings,
    check_numbers,
    check_tokens,
    halve_on_out_of_memory,
    round_up,
    row_attention,
)
from arc.models.loading import decoding


def score_replies(
    model: Any,
    engine: str,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    replies: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    work: Work | None = None,
) -> list[float]:
    """Log probabilities of given replies after given prompts.

    Replies to the same prompt share its computation: they stand one after another behind it in one row, each blind to
    the others. Unsloth's fast path takes no such mask: there each reply is a row of its own behind its prompt.

    Args:
        model, tokenizer: see `search_replies`.
        engine: "unsloth" or "transformers".
        prompts: token ids (tokens,), one for each reply; equal ones are found and computed once.
        replies: token ids (tokens,); an end token counts only where it is there.
        batch_size: rows of one pass.
        work: counts what is done.

    Returns:
        Natural logarithms, in the replies' order.

    Raises:
        ValueError: prompts and replies of different number, an empty one, or a model that this cannot decode.
        torch.OutOfMemoryError: not even one row fits.
    """
    if len(prompts) != len(replies):
        raise ValueError(f"found {len(prompts)} prompts for {len(replies)} replies")
    check_generation_settings(1, batch_size)
    check_tokens(model, "prompt", prompts)
    check_tokens(model, "reply", replies)
    of_prompt: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        of_prompt.setdefault(np.asarray(prompt, dtype=np.int64).tobytes(), []).append(i)
    packs: list[list[int]] = []
    for members in of_prompt.values():
        filled = 0
        for position, i in enumerate(sorted(members, key=lambda i: len(replies[i]))):
            # Attention grows with the square of a row: beyond twice the prompt, a row more costs less.
            limit = 0 if engine == "unsloth" else len(prompts[i])
            if position == 0 or filled + len(replies[i]) > limit:
                packs.append([])
                filled = 0
            packs[-1].append(i)
            filled += len(replies[i])
    waiting = sorted(packs, key=lambda pack: -len(prompts[pack[0]]) - sum(len(replies[i]) for i in pack))
    scores = [math.nan] * len(replies)
    work = work or Work()
    score = _score_alone if engine == "unsloth" else _score_packed

    def run(size: int) -> None:
        while waiting:
            batch = waiting[:size]
            # Without Unsloth, logits are made of the replies alone.
            kept = _row_length if engine == "unsloth" else _reply_length
            batch = batch[: affordable_rows(size, model, max(kept(pack, prompts, replies) for pack in batch))]
            if engine != "unsloth":
                width = max(_row_length(pack, prompts, replies) for pack in batch)
                batch = batch[: affordable_masks(size, model, width, width)]
            score(model, prompts, replies, batch, scores)
            work.passes += 1
            work.prompt_tokens += sum(len(prompts[pack[0]]) for pack in batch)
            work.reply_tokens += sum(len(replies[i]) for pack in batch for i in pack)
            del waiting[: len(batch)]

    attention = contextlib.nullcontext() if engine == "unsloth" else row_attention(model)
    with decoding(model, engine), attention:
        halve_on_out_of_memory(run, batch_size, work)
    check_numbers(scores)
    return scores


def _row_length(pack: Sequence[int], prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> int:
    return len(prompts[pack[0]]) - 1 + sum(len(replies[i]) for i in pack)


def _reply_length(pack: Sequence[int], prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> int:
    return sum(len(replies[i]) for i in pack)


def _score_packed(
    model: Any,
    prompts: Sequence[np.ndarray],
    replies: Sequence[np.ndarray],
    batch: Sequence[Sequence[int]],
    scores: list[float],
) -> None:
    # A row is padding, the prompt but for its last token, and for each reply that last token and the reply but for its
    # own last token. Replies stand at the right end, so that the columns whose logits are wanted are the same ones.
    import torch

    width = round_up(max(_row_length(pack, prompts, replies) for pack in batch), MASK_STEP)
    kept = max(_reply_length(pack, prompts, replies) for pack in batch)
    ids, positions, part = (np.zeros((len(batch), width), dtype=np.int64) for _ in range(3))
    targets = np.zeros((len(batch), kept), dtype=np.int64)
    part -= 1  # -1: padding, 0: the prompt, 1 and so on: the replies
    for row, pack in enumerate(batch):
        shared = np.asarray(prompts[pack[0]])
        at = width - _row_length(pack, prompts, replies)
        begin = len(shared) - 1
        ids[row, at : at + begin], positions[row, at : at + begin] = shared[:-1], np.arange(begin)
        part[row, at : at + begin] = 0
        at += begin
        for number, i in enumerate(pack, 1):
            to = at + len(replies[i])
            ids[row, at], ids[row, at + 1 : to] = shared[-1], replies[i][:-1]
            positions[row, at:to] = np.arange(begin, begin + to - at)
            part[row, at:to] = number
            targets[row, at - width + kept : to - width + kept] = replies[i]
            at = to
    device = model.get_input_embeddings().weight.device
    part_of = torch.from_numpy(part).to(device)
    columns = torch.arange(width, device=device)
    seen = (part_of[:, None, :] == 0) | (part_of[:, None, :] == part_of[:, :, None])
    logits = model(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=(seen & (columns[None, :] <= columns[:, None]))[:, None],
        use_cache=False,
        logits_to_keep=kept,
    ).logits
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float64).gather(
        -1, torch.from_numpy(targets).to(device)[..., None]
    )
    found = log_probs[..., 0].cpu().numpy()
    for row, pack in enumerate(batch):
        at = kept - _reply_length(pack, prompts, replies)
        for i in pack:
            scores[i] = float(found[row, at : at + len(replies[i])].sum())
            at += len(replies[i])


def _score_alone(
    model: Any,
    prompts: Sequence[np.ndarray],
    replies: Sequence[np.ndarray],
    batch: Sequence[Sequence[int]],
    scores: list[float],
) -> None:
    # Padding is on the right, where no token of a row can see it: no mask is needed, and Unsloth takes none.
    import torch

    rows = [np.concatenate([prompts[i], replies[i]]) for [i] in batch]
    ids = np.zeros((len(batch), max(len(row) for row in rows)), dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    tokens = torch.from_numpy(ids).to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    for at, [i] in enumerate(batch):
        first, last = len(prompts[i]) - 1, len(rows[at]) - 1
        log_probs = torch.log_softmax(logits[at, first:last], -1, dtype=torch.float64)
        scores[i] = float(log_probs.gather(-1, tokens[at, first + 1 : last + 1, None]).sum())
