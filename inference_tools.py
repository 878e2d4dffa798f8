"""Decoding: replies of a model to prompts, and how many of them are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arc_loader import ArcDataset, format_options
from model_tools import decoding


def generate_replies(
    model: Any,
    engine: str,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """Greedy replies to prompts.

    Args:
        model: a causal language model (in training or not: it is switched to decoding and back).
        engine: "unsloth" or "transformers".
        tokenizer: gives the pad and the end token.
        prompts: token ids, each (tokens,).
        max_new_tokens: longest reply.
        batch_size: prompts decoded at once.

    Returns:
        Token ids of each reply, in the prompts' order, end token included if there is one, without padding.
    """
    import torch

    replies: list[np.ndarray | None] = [None] * len(prompts)
    # Prompts of about one length together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    with decoding(model, engine):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = np.full((len(chosen), width), tokenizer.pad_token_id, dtype=np.int64)
            mask = np.zeros((len(chosen), width), dtype=np.int64)
            for row, i in enumerate(chosen):  # on the left, so that every reply begins in the same column
                ids[row, width - len(prompts[i]) :] = prompts[i]
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            for row, i in enumerate(chosen):
                reply = out[row, width:].cpu().numpy()
                ends = np.flatnonzero(reply == end)
                replies[i] = reply[: ends[0] + 1] if len(ends) else reply
    return [reply for reply in replies if reply is not None]


def exact_match(
    model: Any,
    engine: str,
    tokenizer: Any,
    dataset: ArcDataset,
    prompts: Sequence[dict[str, Any]],
    *,
    batch_size: int,
) -> dict[str, float]:
    """Decode prompts greedily and compare with the solutions.

    Args:
        model, engine, tokenizer, batch_size: see `generate_replies`.
        dataset: holds the solutions.
        prompts: rows with "key" and "input_ids", as SampleEncoder gives them with reply=False.

    Returns:
        `eval_exact_match` and `eval_decodable`, shares of the prompts.
    """
    options = format_options(tokenizer.eos_token)
    longest = longest_reply(dataset, [row["key"] for row in prompts], tokenizer)
    replies = generate_replies(model, engine, tokenizer, [row["input_ids"] for row in prompts], longest, batch_size)
    solved = decodable = 0
    for row, reply in zip(prompts, replies, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=False)
        grid, correct, _ = dataset.decode(text, options["lines_sep"], key=row["key"], reply_end=options["reply_end"])
        decodable += grid is not None
        solved += correct is True
    return {"eval_exact_match": solved / len(prompts), "eval_decodable": decodable / len(prompts)}


def longest_reply(dataset: ArcDataset, keys: Sequence[str], tokenizer: Any) -> int:
    """Tokens of the longest reply to any of the keys, end token included, in whichever orientation is longer."""
    options = format_options(tokenizer.eos_token)
    shapes = {
        dataset.solutions[dataset.get_base_key(key)][dataset.get_base_key_and_reply_num(key)[1]].shape for key in keys
    }
    longest = 0
    for shape in shapes | {shape[::-1] for shape in shapes}:
        text = ArcDataset.fmt_output(
            np.zeros(shape, dtype=np.uint8), options["reply_end"], lines_sep=options["lines_sep"]
        )
        longest = max(longest, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return longest
