"""Depth-first search: all replies of a model that are at least as probable as a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.rows import Reply, Row, Work, check_generation_settings, check_guesses, decode_rows

if TYPE_CHECKING:
    import torch


def search_replies(
    model: Any, engine: str, tokenizer: Any, prompts: Sequence[np.ndarray], *, max_new_tokens: int,
    min_prob: float = 0.1, guesses: Sequence[np.ndarray | None] | None = None, batch_size: int = 32,
    draft_tokens: int = 32, done: Callable[[int, list[Reply]], None] | None = None, work: Work | None = None,
) -> list[list[Reply]]:  # fmt: skip
    """All replies whose probability is at least `min_prob`, each exactly once, by depth-first search.

    There are at most 1 / min_prob such replies, and at most as many tokens worth following at a position. A search has
    one path in the cache and a stack of branches. Each pass feeds the newest branch and a draft from the best guess:
    the given one, later the most probable reply so far. One pass verifies the whole draft and shows its branches. So a
    right guess costs one pass for the prompt and one for the reply.

    The replies do not depend on guesses, drafts or other prompts. In 16 bits, passes of another shape round
    differently: log probabilities move by about 0.01, which can decide about a reply as near to `min_prob`.

    Args:
        model: of transformers, with or without an adapter, 16-bit or quantised; it is switched to decoding and back.
        engine: "transformers". Unsloth's fast path needs its own cache, with one length for all rows.
        tokenizer: gives the end token.
        prompts: token ids (tokens,) each, not empty.
        max_new_tokens: longest reply, with its end token; a longer path is dropped.
        min_prob: the least probability, above 0 and up to 1.
        guesses: for each prompt a likely reply (tokens,), whole or its beginning, or None.
        batch_size: prompts searched at once; the next prompt replaces a finished one.
        draft_tokens: longest draft after the first pass, 0: none. Does not limit `guesses`.
        done: called with a prompt's number and its replies as soon as they are complete.
        work: gets the cost.

    Returns:
        For each prompt its replies with their end tokens, most probable first.

    Raises:
        ValueError: a setting or token out of range, a model that cannot be decoded here, or that answers with NaN.
        torch.OutOfMemoryError: not even one prompt fits.

    Source: the idea is the ARChitects' depth-first search with a verified first guess (Franzen et al. 2025, arXiv
    2505.07859), which runs one prompt at a time and drafts only once.
    """
    import torch

    if not 0 < min_prob <= 1:
        raise ValueError(f"min_prob is {min_prob}: expected a probability above 0 and up to 1")
    check_generation_settings(max_new_tokens, batch_size)
    guesses, end = check_guesses(model, prompts, guesses), tokenizer.eos_token_id
    searches = [
        _Search(math.log(min_prob), i, prompts[i], guesses[i], end, max_new_tokens, draft_tokens)
        for i in range(len(prompts))
    ]

    def choose(logits: torch.Tensor, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
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


class _Search(Row):
    # The search of the replies to one prompt. It does not call the model.

    def __init__(self, bound: float, *arguments: Any):
        super().__init__(*arguments)
        self.bound = bound  # the least log probability
        self.stack: list[tuple[int, int, float]] = []  # position in the path, token, log probability with it
        self.replies: list[Reply] = []

    def take(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        # Follow the draft as far as it is right, then go on with the newest branch. Both are (fed, choices): the most
        # probable next tokens after each token fed, and their log probabilities, descending.
        right = 0  # tokens of the draft
        for row, drafted in enumerate([*self.drafted, None]):
            followed = self._branch(tokens[row], log_probs[row], drafted)
            if followed is None:
                break
            self.path.append(followed[0])
            self.log_prob = followed[1]
            right += 1
        self.adapt_draft(right)
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
                if all(total > reply.log_prob for reply in self.replies):
                    self.guess[:at] = self.path
                self.replies.append(Reply(np.array([*self.path, self.end], dtype=np.int64), total))
            elif at + 2 > self.max_new_tokens:  # no room for it and the end token
                continue
            elif token == drafted:
                followed = token, total
            else:
                branches.append((at, token, total))
        self.stack += reversed(branches)  # the most probable is followed first
        return followed
