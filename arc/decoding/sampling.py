"""Sampled replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.rows import Reply, Row, Work, check_generation_settings, check_guesses, decode_rows

if TYPE_CHECKING:
    import torch

LOOK = 32  # tokens of a reply between two calls of `hopeless`


def sample_replies(
    model: Any, engine: str, tokenizer: Any, prompts: Sequence[np.ndarray], *, max_new_tokens: int, samples: int = 1,
    temperature: float = 1.0, seed: int = 0, seeds: Sequence[int] | None = None,
    guesses: Sequence[np.ndarray | None] | None = None, batch_size: int = 32, draft_tokens: int = 32,
    hopeless: Callable[[list[int]], bool] | None = None, done: Callable[[int, list[Reply]], None] | None = None,
    work: Work | None = None,
) -> list[list[Reply]]:  # fmt: skip
    """Sampled or greedy replies; samples of one prompt compute it once.

    Each sample has its own random numbers, one a token, from the seed, the prompt's and the sample's number. So the
    replies do not depend on the batch size or on when others end, apart from the rounding of 16-bit passes. One pass
    verifies a whole guess: its tokens up to the first wrong one cost nothing more.

    Args:
        model, engine, tokenizer, prompts, done, work: see `search.search_replies`.
        max_new_tokens: a reply that is cut off there has no end token.
        temperature: logits are divided by it; 0: greedy.
        seed: of the random numbers, from 0.
        seeds: a number from 0 for each prompt, in place of 0, 1 and so on.
        guesses, draft_tokens: see `search.search_replies`. They change the time, not the result.
        batch_size: replies decoded at once; the next reply replaces a finished one.
        hopeless: called with a reply's tokens every few tokens; True ends the reply there, without an end token.

    Returns:
        For each prompt its samples, in order. Log probabilities are the model's, at temperature 1.

    Raises:
        ValueError, torch.OutOfMemoryError: see `search.search_replies`.
    """
    import torch

    if samples < 1 or not 0 <= temperature < math.inf or seed < 0:
        raise ValueError(
            f"samples, temperature and seed are {samples}, {temperature} and {seed}: expected at least 1, 0 and 0"
        )
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"found {len(seeds)} seeds for {len(prompts)} prompts")
    check_generation_settings(max_new_tokens, batch_size)
    guesses, end = check_guesses(model, prompts, guesses), tokenizer.eos_token_id
    numbers = list(range(len(prompts)) if seeds is None else seeds)
    rows = []
    for i in range(len(prompts)):
        for k in range(samples):
            draws = random_draws(seed, [numbers[i]], max_new_tokens, k)[0]
            rows.append(_Sample(draws, hopeless, i, prompts[i], guesses[i], end, max_new_tokens, draft_tokens))
    remaining = [samples] * len(prompts)

    def choose(logits: torch.Tensor, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        draws = np.zeros((len(rows), logits.shape[1], 1))
        if temperature:
            for at, row in enumerate(rows):
                ahead = row.draws[len(row.path) :][: logits.shape[1]]
                draws[at, : len(ahead), 0] = ahead
        tokens, log_probs = draw_tokens(logits, torch.from_numpy(draws).to(logits.device), temperature)
        return tokens.cpu().numpy(), log_probs.cpu().numpy()

    def replies_of(number: int) -> list[Reply]:
        group = rows[number * samples : (number + 1) * samples]
        return [Reply(np.array(row.path, dtype=np.int64), row.log_prob) for row in group]

    def finish(row: _Sample) -> None:
        remaining[row.number] -= 1
        if done is not None and not remaining[row.number]:
            done(row.number, replies_of(row.number))

    decode_rows(model, engine, rows, batch_size, choose, finish, work)
    return [replies_of(number) for number in range(len(prompts))]


def random_draws(seed: int, numbers: Sequence[int], length: int, sample: int = 0) -> np.ndarray:
    """Random numbers of one sample of each prompt, one a token: float64 from 0 to below 1, (numbers, length)."""
    return np.stack([np.random.default_rng([seed, number, sample]).random(length) for number in numbers])


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose tokens from logits (rows, fed, vocabulary) by random numbers; temperature 0: the most probable ones.

    Args:
        draws: float64 from 0 to below 1, (rows, fed, 1); not used for temperature 0.

    Returns:
        Tokens, int64, and log probabilities at temperature 1, float64, each (rows, fed).
    """
    import torch

    logits = logits.double()
    if temperature:
        reached = torch.softmax(logits / temperature, -1).cumsum(-1)
        # Draws are scaled by the sum, which rounding moves from 1, so that every draw meets a token. `right` skips
        # tokens of probability 0.
        tokens = torch.searchsorted(reached, draws * reached[..., -1:], right=True).clamp(max=logits.shape[-1] - 1)
    else:
        tokens = logits.argmax(-1, keepdim=True)
    log_probs = torch.log_softmax(logits, -1).gather(-1, tokens)
    return tokens[..., 0], log_probs[..., 0]


class _Sample(Row):
    # One sampled reply. It does not call the model.

    def __init__(self, draws: np.ndarray, hopeless: Callable[[list[int]], bool] | None, *arguments: Any):
        super().__init__(*arguments)
        self.draws, self.hopeless = draws, hopeless

    def take(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        # Add the tokens chosen after each fed token, (fed,), up to the first one that the draft has wrong.
        before, right = len(self.path), 0
        for token, log_prob, drafted in zip(tokens.tolist(), log_probs.tolist(), [*self.drafted, None], strict=False):
            self.path.append(token)
            self.log_prob += log_prob
            if token != drafted:
                break
            right += 1
        self.adapt_draft(right)
        self.is_open = self.path[-1] != self.end and len(self.path) < self.max_new_tokens
        if self.is_open and self.hopeless and len(self.path) // LOOK > before // LOOK:
            self.is_open = not self.hopeless(self.path)
