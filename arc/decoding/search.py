"""Depth-first search: all replies of a model that are at least as probable as a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.rows import Reply, Work, check_generation_settings, check_tokens, decode_rows

if TYPE_CHECKING:
    import torch


def search_replies(
    model: Any,
    engine: str,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    min_prob: float = 0.1,
    guesses: Sequence[np.ndarray | None] | None = None,
    batch_size: int = 32,
    draft_tokens: int = 32,
    done: Callable[[int, list[Reply]], None] | None = None,
    work: Work | None = None,
) -> list[list[Reply]]:
    """All replies whose probability is at least `min_prob`, each exactly once, by depth-first search.

    Replies exclude each other, so there are at most 1 / min_prob of them, and no position has more tokens worth
    following. A search holds one path in the cache and a stack of branches. Each pass feeds the newest branch and a
    draft: the tokens at the next positions of the best guess (the given one, later the most probable reply so far).
    One pass verifies the whole draft and shows the branches beside it. So a right guess costs one pass for the prompt
    and one for the reply; a reply that differs from it in one cell costs a few more.

    The replies do not depend on guesses, drafts or the other prompts of a batch. In 16 bits, passes of another shape
    round differently: that moves a log probability by about 0.01, and can decide about a reply as near to `min_prob`.

    Args:
        model: a causal language model of transformers, with or without a peft adapter, 16-bit or quantised; it is
            switched to decoding and back.
        engine: "transformers". Unsloth's fast path needs its own cache, with one length for all rows.
        tokenizer: gives the end token.
        prompts: token ids, each (tokens,), at least one token.
        max_new_tokens: longest reply, with its end token; a longer path is dropped.
        min_prob: the least probability, above 0 and up to 1.
        guesses: for each prompt a likely reply (tokens,), whole or its beginning, or None.
        batch_size: prompts searched at once; the next prompt replaces a finished one.
        draft_tokens: longest draft after the first pass, 0: none. Does not limit `guesses`.
        done: called with a prompt's number and its replies as soon as they are complete, in any order.
        work: gets the cost.

    Returns:
        For each prompt its replies with their end tokens, most probable first.

    Raises:
        ValueError: a setting out of its range, an empty prompt, a model that cannot be decoded here, or one that
            answers with NaN.
        torch.OutOfMemoryError: not even one prompt fits.

    Source: the idea is the ARChitects' depth-first search with a verified first guess (Franzen et al. 2025, arXiv
    2505.07859), which runs one prompt at a time and drafts only once.
    """
    import torch

    if not 0 < min_prob <= 1:
        raise ValueError(f"min_prob is {min_prob}: expected a probability above 0 and up to 1")
    if guesses is not None and len(guesses) != len(prompts):
        raise ValueError(f"found {len(guesses)} guesses for {len(prompts)} prompts")
    check_generation_settings(max_new_tokens, batch_size)
    check_tokens(model, "prompt", prompts)
    # An empty guess is none.
    guesses = [guess if guess is not None and len(guess) else None for guess in guesses or [None] * len(prompts)]
    check_tokens(model, "guess", guesses)
    options = {"end": tokenizer.eos_token_id, "max_new_tokens": max_new_tokens, "draft_tokens": draft_tokens}
    searches = [
        _Search(i, prompt, guess, bound=math.log(min_prob), **options)
        for i, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True))
    ]

    def choose(logits: torch.Tensor, rows: Sequence[Any]) -> tuple[np.ndarray, ...]:
        # One token more than can be worth following, so that rounding cannot lose one.
        count = min(logits.shape[-1], int(1 / min_prob) + 1)
        values, tokens = torch.log_softmax(logits, -1, dtype=torch.float64).topk(count, dim=-1)
        return tokens.cpu().numpy(), values.cpu().numpy()

    def finish(search: _Search) -> None:
        search.replies.sort(key=lambda reply: (-reply.log_prob, reply.tokens.tolist()))
        if done is not None:
            done(search.number, search.replies)

    decode_rows(model, engine, searches, batch_size, choose, finish, work)
    return [search.replies for search in searches]


class _Search:
    """The search of the replies to one prompt; see `rows.Row`. It does not call the model."""

    def __init__(
        self,
        number: int,
        prompt: np.ndarray,
        guess: np.ndarray | None,
        *,
        bound: float,
        end: int,
        max_new_tokens: int,
        draft_tokens: int,
    ):
        self.number = number
        self.prompt = [int(token) for token in prompt]
        self.bound, self.end, self.max_new_tokens, self.draft_tokens = bound, end, max_new_tokens, draft_tokens
        self.guess = [int(token) for token in guess] if guess is not None else []
        if end in self.guess:  # it is never fed: nothing comes after it
            del self.guess[self.guess.index(end) :]
        self.draft = len(self.guess)  # tokens to draft next
        self.drafted: list[int] = []
        self.path: list[int] = []
        self.log_prob = 0.0  # of the path
        self.stack: list[tuple[int, int, float]] = []  # position in the path, token, log probability with it
        self.replies: list[Reply] = []
        self.is_open = True

    def feed(self) -> list[int]:
        """The last token, which has not been fed yet, and a draft."""
        at = len(self.path)
        self.drafted = self.guess[at : min(at + self.draft, self.max_new_tokens - 1)]
        return [self.path[-1] if self.path else self.prompt[-1], *self.drafted]

    def take(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Follow the draft as far as it is right, then go on with the newest branch.

        Args:
            tokens: the most probable next tokens after each token fed, int64 (fed, choices).
            log_probs: their log probabilities, descending, float64 (fed, choices).
        """
        right = 0  # tokens of the draft
        for row, drafted in enumerate([*self.drafted, None]):
            followed = self._branch(tokens[row], log_probs[row], drafted)
            if followed is None:
                break
            self.path.append(followed[0])
            self.log_prob = followed[1]
            right += 1
        # At least 1: a guess whose first token is wrong may be right after it.
        self.draft = min(self.draft_tokens, max(1, 2 * right if right == len(self.drafted) else right))
        if not self.stack:
            self.is_open = False
            return
        at, token, self.log_prob = self.stack.pop()
        if at < len(self.path):  # back to an earlier position, where the guess may be right again
            self.draft = self.draft_tokens
        # Later branches lie deeper, so up to here the path is still the one that this branch left.
        self.path[at:] = [token]

    def _branch(self, tokens: np.ndarray, log_probs: np.ndarray, drafted: int | None) -> tuple[int, float] | None:
        # Adds the replies that end here, and puts branches on the stack. Returns the drafted token, if it is probable
        # enough, with the path's log probability; it gets no branch.
        at, followed, branches = len(self.path), None, []
        for token, log_prob in zip(tokens.tolist(), log_probs.tolist(), strict=True):
            total = self.log_prob + log_prob
            if total < self.bound:
                break
            if token == self.end:
                self._add(total)
            elif at + 2 > self.max_new_tokens:  # no room for it and the end token
                continue
            elif token == drafted:
                followed = token, total
            else:
                branches.append((at, token, total))
        self.stack += reversed(branches)  # the most probable is followed first
        return followed

    def _add(self, log_prob: float) -> None:
        if all(log_prob > reply.log_prob for reply in self.replies):
            self.guess[: len(self.path)] = self.path
        self.replies.append(Reply(np.array([*self.path, self.end], dtype=np.int64), log_prob))
