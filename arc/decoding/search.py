"""Replies of a model: found by depth-first search, sampled, and scored.

`search_replies`, `sample_replies` and `score_replies` take token ids and give token ids and log probabilities; what the
tokens mean, and which reply is best, is decided by arc/decoding/greedy.py. How many prompts advance together on one
key-value cache is arc/decoding/rows.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.rows import (
    MASK_STEP,
    Work,
    affordable_masks,
    affordable_rows,
    check_numbers,
    check_tokens,
    decode_rows,
    halve_on_out_of_memory,
    round_up,
    row_attention,
)
from arc.models.loading import decoding

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Reply:
    """A reply and how probable it is.

    Args:
        tokens: int64 (tokens,), end token included if there is one.
        log_prob: natural logarithm of the probability that the model gives these tokens after the prompt.
    """

    tokens: np.ndarray
    log_prob: float


def _check_settings(max_new_tokens: int, batch_size: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size are {max_new_tokens} and {batch_size}: expected at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# Search


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

    Replies are disjoint events, so there are at most 1 / min_prob of them, and no position has more than that many
    tokens worth following. A search holds one path in the cache and a stack of branches beside it. Each pass feeds the
    newest branch, followed by a draft: what stands at those positions in the best guess (the one given, later the most
    probable reply found). The draft is verified in that one pass; where it holds, all its tokens would have had to be
    computed anyway, one pass each, and the branches beside it come for nothing. So a right guess costs one pass for
    the prompt and one for the reply, and a reply that differs from it in one cell a few more.

    What is found does not depend on guesses, drafts or the other prompts of a batch. Probabilities are exact for the
    arithmetic of the model: in 16 bits, passes of another shape round otherwise, which moves a log probability by
    about 0.01, and can decide about a reply whose probability is as near to `min_prob` as that.

    Args:
        model: a causal language model of transformers, plain or with a peft adapter, 16-bit or quantised (in training
            or not: it is switched to decoding and back).
        engine: "transformers". Unsloth's fast path takes a cache of its own only, with one length for all rows.
        tokenizer: gives the end token.
        prompts: token ids, each (tokens,), at least one.
        max_new_tokens: longest reply, end token included; a path that has not ended by then is dropped.
        min_prob: the least probability, above 0 and up to 1.
        guesses: for each prompt a likely reply (tokens,), whole or only its begin, or None.
        batch_size: prompts searched at once; a finished one is replaced by the next.
        draft_tokens: longest draft after the first pass, 0: none. Does not limit `guesses`.
        done: called with a prompt's number and its replies as soon as they are complete, in any order.
        work: counts what is done.

    Returns:
        For each prompt its replies with their end tokens, most probable first.

    Raises:
        ValueError: a setting out of its range, an empty prompt, a model that this cannot decode, or one that answers
            with numbers that are none.
        torch.OutOfMemoryError: not even one prompt fits.

    Source: the idea is the ARChitects' depth-first search with a verified first guess (Franzen et al. 2025, arXiv
    2505.07859), which runs one prompt at a time and drafts only once.
    """
    import torch

    if not 0 < min_prob <= 1:
        raise ValueError(f"min_prob is {min_prob}: expected a probability above 0 and up to 1")
    if guesses is not None and len(guesses) != len(prompts):
        raise ValueError(f"found {len(guesses)} guesses for {len(prompts)} prompts")
    _check_settings(max_new_tokens, batch_size)
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
        # One token more than can be worth following, so that rounding loses none.
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
    """Depth-first search of the replies to one prompt, apart from the model."""

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
        """The token that has not been fed yet, and a draft of what comes after it."""
        at = len(self.path)
        self.drafted = self.guess[at : min(at + self.draft, self.max_new_tokens - 1)]
        return [self.path[-1] if self.path else self.prompt[-1], *self.drafted]

    def take(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Follow the draft as far as it holds, then go on with the newest branch.

        Args:
            tokens: the most probable next tokens after each token fed, int64 (fed, choices).
            log_probs: theirs, falling, float64 (fed, choices).
        """
        held = 0
        for row, wanted in enumerate([*self.drafted, None]):
            kept = self._branch(tokens[row], log_probs[row], wanted)
            if kept is None:
                break
            self.path.append(kept[0])
            self.log_prob = kept[1]
            held += 1
        # At least 1: a guess whose first token is wrong may be right after it.
        self.draft = min(self.draft_tokens, max(1, 2 * held if held == len(self.drafted) else held))
        if not self.stack:
            self.is_open = False
            return
        at, token, self.log_prob = self.stack.pop()
        if at < len(self.path):  # back to another place, where the guess may hold again
            self.draft = self.draft_tokens
        # Branches that were put on the stack later lie deeper, so the path is still the one that this branch left.
        self.path[at:] = [token]

    def _branch(self, tokens: np.ndarray, log_probs: np.ndarray, wanted: int | None) -> tuple[int, float] | None:
        # What may come after the path: replies that end here, and branches, of which `wanted` is returned instead.
        at, kept, branches = len(self.path), None, []
        for token, log_prob in zip(tokens.tolist(), log_probs.tolist(), strict=True):
            total = self.log_prob + log_prob
            if total < self.bound:
                break
            if token == self.end:
                self._add(total)
            elif at + 2 > self.max_new_tokens:  # no room for it and the end token
                continue
            elif token == wanted:
                kept = token, total
            else:
                branches.append((at, token, total))
        self.stack += reversed(branches)  # the most probable is followed first
        return kept

    def _add(self, log_prob: float) -> None:
        if all(log_prob > reply.log_prob for reply in self.replies):
            self.guess[: len(self.path)] = self.path
        self.replies.append(Reply(np.array([*self.path, self.end], dtype=np.int64), log_prob))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_replies(
    model: Any,
    engine: str,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    guesses: Sequence[np.ndarray | None] | None = None,
    batch_size: int = 32,
    draft_tokens: int = 32,
    hopeless: Callable[[list[int]], bool] | None = None,
    done: Callable[[int, list[Reply]], None] | None = None,
    work: Work | None = None,
) -> list[list[Reply]]:
    """Sampled replies, or greedy ones; samples of one prompt share its computation.

    Every sample has random numbers of its own, one a token, drawn from the seed, the prompt's and the sample's number:
    what comes out does not depend on the batch size or on which replies end when (apart from the rounding of 16-bit
    passes). So which token a sample would have at a place is known as soon as the logits there are, and a guess can be
    verified in one pass: as far as it is what the sample would be, its tokens cost nothing.

    Args:
        model, engine, tokenizer, prompts, done, work: see `search_replies`.
        max_new_tokens: longest reply; one that has not ended by then has no end token.
        samples: replies of each prompt.
        temperature: logits are divided by it; 0: greedy.
        seed: of the random numbers, from 0.
        seeds: a number from 0 for each prompt, in place of 0, 1 and so on.
        guesses: for each prompt what its replies may look like (tokens,), or None. Makes no difference to the result.
        batch_size: replies decoded at once; a finished one is replaced by the next.
        draft_tokens: most tokens of a guess that are verified in one pass, after the first.
        hopeless: called with a reply's tokens now and then; where it says True, that reply ends there, without an end
            token.

    Returns:
        For each prompt its samples, in order. Log probabilities are the model's, at temperature 1.

    Raises:
        ValueError, torch.OutOfMemoryError: see `search_replies`.
    """
    import torch

    if samples < 1 or not 0 <= temperature < math.inf or seed < 0:
        raise ValueError(
            f"samples, temperature and seed are {samples}, {temperature} and {seed}: expected at least 1, 0 and 0"
        )
    for name, given in (("guesses", guesses), ("seeds", seeds)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"found {len(given)} {name} for {len(prompts)} prompts")
    _check_settings(max_new_tokens, batch_size)
    check_tokens(model, "prompt", prompts)
    guesses = [guess if guess is not None and len(guess) else None for guess in guesses or [None] * len(prompts)]
    check_tokens(model, "guess", guesses)
    numbers = list(range(len(prompts)) if seeds is None else seeds)
    rows = [
        _Sample(
            i, prompt, guess, tokenizer.eos_token_id,
            random_draws(seed, [numbers[i]], max_new_tokens, k)[0], draft_tokens, hopeless,
        )
        for i, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True))
        for k in range(samples)
    ]  # fmt: skip
    remaining = [samples] * len(prompts)

    def choose(logits: torch.Tensor, rows: Sequence[Any]) -> tuple[np.ndarray, ...]:
        draws = np.zeros((len(rows), logits.shape[1], 1))
        if temperature:
            for at, row in enumerate(rows):
                part = row.draws[len(row.path) :][: logits.shape[1]]
                draws[at, : len(part), 0] = part
        tokens, log_probs = draw_tokens(logits, torch.from_numpy(draws).to(logits.device), temperature)
        return tokens.cpu().numpy(), log_probs.cpu().numpy()

    def finish(row: _Sample) -> None:
        remaining[row.number] -= 1
        if done is not None and not remaining[row.number]:
            done(row.number, replies_of(row.number))

    def replies_of(number: int) -> list[Reply]:
        chosen = rows[number * samples : (number + 1) * samples]
        return [Reply(np.array(row.path, dtype=np.int64), row.log_prob) for row in chosen]

    decode_rows(model, engine, rows, batch_size, choose, finish, work)
    return [replies_of(number) for number in range(len(prompts))]


def random_draws(seed: int, numbers: Sequence[int], length: int, sample: int = 0) -> np.ndarray:
    """The random numbers of samples, one for each token: float64 from 0 to below 1, (numbers, length).

    Args:
        seed: from 0.
        numbers: one from 0 for each prompt.
        length: tokens.
        sample: which of the samples of a prompt.
    """
    return np.stack([np.random.default_rng([seed, number, sample]).random(length) for number in numbers])


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that random numbers choose, and their log probabilities at temperature 1.

    Args:
        logits: (rows, fed, vocabulary).
        draws: float64 from 0 to below 1, (rows, fed, 1); not used for temperature 0.
        temperature: logits are divided by it; 0: the most probable token.

    Returns:
        Tokens, int64, and log probabilities, float64, each (rows, fed).
    """
    import torch

    logits = logits.double()
    if temperature:
        reached = torch.softmax(logits / temperature, -1).cumsum(-1)
        # Scaled by the sum, which rounding keeps from being 1; a draw is below 1, so that some token is reached, and
        # `right` passes over tokens of probability 0.
        tokens = torch.searchsorted(reached, draws * reached[..., -1:], right=True).clamp(max=logits.shape[-1] - 1)
    else:
        tokens = logits.argmax(-1, keepdim=True)
    log_probs = torch.log_softmax(logits, -1).gather(-1, tokens)
    return tokens[..., 0], log_probs[..., 0]


LOOK = 32  # tokens of a reply between two questions whether it is hopeless


class _Sample:
    """One sampled reply, apart from the model."""

    def __init__(
        self,
        number: int,
        prompt: np.ndarray,
        guess: np.ndarray | None,
        end: int,
        draws: np.ndarray,
        draft_tokens: int,
        hopeless: Callable[[list[int]], bool] | None,
    ):
        self.number, self.end, self.draws, self.draft_tokens, self.hopeless = number, end, draws, draft_tokens, hopeless
        self.prompt = [int(token) for token in prompt]
        self.guess = [int(token) for token in guess] if guess is not None else []
        if end in self.guess:  # it is never fed: nothing comes after it
            del self.guess[self.guess.index(end) :]
        self.draft = len(self.guess)  # tokens to draft next
        self.drafted: list[int] = []
        self.path: list[int] = []
        self.log_prob = 0.0
        self.is_open = True

    def feed(self) -> list[int]:
        """The token that has not been fed yet, and a draft of what comes after it."""
        at = len(self.path)
        self.drafted = self.guess[at : min(at + self.draft, len(self.draws) - 1)]
        return [self.path[-1] if self.path else self.prompt[-1], *self.drafted]

    def take(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Add what was chosen after each token fed (fed,), as long as that token was itself what was chosen."""
        before, held = len(self.path), 0
        for token, log_prob, wanted in zip(tokens.tolist(), log_probs.tolist(), [*self.drafted, None], strict=False):
            self.path.append(token)
            self.log_prob += log_prob
            if token != wanted:
                break
            held += 1
        # At least 1: a guess whose first token is wrong may be right after it.
        self.draft = min(self.draft_tokens, max(1, 2 * held if held == len(self.drafted) else held))
        self.is_open = self.path[-1] != self.end and len(self.path) < len(self.draws)
        if self.is_open and self.hopeless and len(self.path) // LOOK > before // LOOK:
            self.is_open = not self.hopeless(self.path)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


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
    _check_settings(1, batch_size)
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
