"""Replies by the model's own `generate`, and how many greedy ones solve their puzzles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from arc.models.loading import decoding
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.text import format_options


def generate_replies(
    model: Any, engine: str, tokenizer: Any, prompts: Sequence[np.ndarray], max_new_tokens: int, batch_size: int = 8,
    *, temperature: float = 0.0, seed: int = 0,
) -> list[np.ndarray]:  # fmt: skip
    """Greedy or sampled replies to prompts, by the model's own `generate`.

    Args:
        engine: "unsloth" or "transformers"; the model is switched to decoding and back.
        prompts: token ids, each (tokens,).
        temperature: of the sampling; 0: greedy.
        seed: of the sampling, which also depends on prompts and batch size. torch's random state does not change.

    Returns:
        Token ids of each reply in the prompts' order, without padding, with the end token if there is one.
    """
    import torch

    replies: list[np.ndarray | None] = [None] * len(prompts)
    # Prompts of similar length together need less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": bool(temperature), "use_cache": True}
    if temperature:  # explicit, because the model's configuration may cut the distribution
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with decoding(model, engine), torch.random.fork_rng(enabled=bool(temperature)):
        if temperature:
            torch.manual_seed(seed)
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = np.full((len(batch), width), tokenizer.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(batch):  # padded on the left, so that all replies begin in one column
                ids[row, width - len(prompts[i]) :] = prompts[i]
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device),
                eos_token_id=end, pad_token_id=tokenizer.pad_token_id, **options,
            )  # fmt: skip
            for row, i in enumerate(batch):
                reply = out[row, width:].cpu().numpy()
                ends = np.flatnonzero(reply == end)
                replies[i] = reply[: ends[0] + 1] if len(ends) else reply
    return [reply for reply in replies if reply is not None]


class GreedyAnswer(NamedTuple):
    """A greedy reply, and whether it solves its puzzle."""

    tokens: np.ndarray  # int64 (tokens,), see `generate_replies`
    decodable: bool  # the reply is a grid
    solved: bool  # the grid is the solution


def greedy_answers(
    model: Any, engine: str, tokenizer: Any, dataset: ArcDataset, prompts: Sequence[dict[str, Any]], *, batch_size: int
) -> list[GreedyAnswer]:
    """Decode prompts greedily and compare with the dataset's solutions, see `generate_replies`.

    Args:
        prompts: rows with "key" and "input_ids", as SampleEncoder gives them with reply=False.
    """
    options = format_options(tokenizer.eos_token)
    longest = longest_reply(dataset, [row["key"] for row in prompts], tokenizer)
    replies = generate_replies(model, engine, tokenizer, [row["input_ids"] for row in prompts], longest, batch_size)
    answers = []
    for row, reply in zip(prompts, replies, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=False)
        grid, correct, _ = dataset.decode(text, options["lines_sep"], key=row["key"], reply_end=options["reply_end"])
        answers.append(GreedyAnswer(reply, grid is not None, correct is True))
    return answers


def exact_match(
    model: Any, engine: str, tokenizer: Any, dataset: ArcDataset, prompts: Sequence[dict[str, Any]], *, batch_size: int
) -> dict[str, float]:
    """`eval_exact_match` and `eval_decodable`, shares of the prompts; see `greedy_answers`."""
    answers = greedy_answers(model, engine, tokenizer, dataset, prompts, batch_size=batch_size)
    return {
        "eval_exact_match": sum(answer.solved for answer in answers) / len(answers),
        "eval_decodable": sum(answer.decodable for answer in answers) / len(answers),
    }


def longest_reply(dataset: ArcDataset, keys: Sequence[str], tokenizer: Any) -> int:
    """Tokens of the longest reply to any of the keys, with the end token, in its longer orientation."""
    options = format_options(tokenizer.eos_token)
    bases = [(dataset.get_base_key(key), dataset.get_base_key_and_reply_num(key)[1]) for key in keys]
    shapes = {dataset.solutions[base][number].shape for base, number in bases}
    longest = 0
    for shape in shapes | {shape[::-1] for shape in shapes}:
        grid = np.zeros(shape, dtype=np.uint8)
        text = ArcDataset.fmt_output(grid, options["reply_end"], lines_sep=options["lines_sep"])
        longest = max(longest, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return longest
