"""The replies of a model to prompts, each computed once: a cache on the disk holds them.

So a killed evaluation goes on where it was, and one with more views computes only the new ones.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import diskcache
import numpy as np

from arc.decoding.rows import Reply, Work
from arc.decoding.sampling import sample_replies
from arc.decoding.scoring import score_replies
from arc.decoding.search import search_replies
from arc.evaluation.models import EvaluatedModel, default_batch_size, load_evaluated, longest_context, tokenizer_folder
from arc.evaluation.progress import Progress
from arc.evaluation.result_cache import UntrustedCacheError
from arc.models.vocabulary import load_tokenizer
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.grids import MAX_SIDE
from arc.puzzles.text import can_become_grid, format_options
from arc.runs.settings import user_errors

Rows = Sequence[np.ndarray]  # token ids, (tokens,) each


class Replies:
    """One model's replies. Cached ones are not computed again, and no weights are loaded for them.

    Raises:
        ValueError: the context has no room for a prompt and the longest reply, or the tokenizer has no end token.
    """

    cache: diskcache.Cache
    progress: Progress

    def __init__(self, model: EvaluatedModel, settings: Any):
        self.evaluated, self.settings = model, settings
        self.tokenizer = load_tokenizer(tokenizer_folder(model))
        if self.tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {model.name} has no end token (eos_token): no reply could end")
        self.encoder = SampleEncoder(self.tokenizer, **format_options(self.tokenizer.eos_token))
        longest = longest_reply(self.encoder)
        self.max_new_tokens = min(longest, settings.max_new_tokens or longest)
        self.context = min(settings.max_seq_length, longest_context(model.path) or settings.max_seq_length)
        self.prompt_tokens = self.context - self.max_new_tokens
        if self.prompt_tokens < 16:
            takes = f"{model.name} takes rows of {self.context} tokens, of which a reply may need {self.max_new_tokens}"
            raise ValueError(f"{takes}: raise --max_seq_length or lower --max_new_tokens")
        self.longest = self.context  # tokens of the longest row; `answer_puzzles` sets it
        self.seconds = 0.0  # of computing
        self._model: Any = None
        self._batch_size = settings.batch_size
        self._scoring_batch_size: int | None = None  # rows that fitted, after memory ran out

    def open(self, cache: diskcache.Cache, progress: Progress) -> None:
        """Use a cache, as `result_cache.open_cache` gives it, and count each row on a progress bar."""
        self.cache, self.progress = cache, progress

    @property
    def model(self) -> Any:
        """The model, loaded on first use."""
        if self._model is None:
            with user_errors(), self.progress.paused():
                self._model = load_evaluated(self.evaluated, self.context)
            self._batch_size = self._batch_size or default_batch_size(self._model, self.longest)
        return self._model

    @property
    def batch_size(self) -> int:
        """Rows decoded at once."""
        return self._batch_size or 32

    def close(self) -> None:
        """Free the model's memory."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def greedy(self, prompts: Rows, guesses: Rows) -> list[Reply]:
        """The greedy reply to each prompt, cut short once it can no longer become a grid."""
        names = [self._name("greedy", prompt, self.max_new_tokens) for prompt in prompts]
        options: dict[str, Any] = {"samples": 1, "temperature": 0.0, "hopeless": self._is_hopeless}
        return [replies[0] for replies in self._decode(sample_replies, names, prompts, guesses, least=1, **options)]

    def sampled(self, prompts: Rows, guesses: Rows, samples: int, temperature: float) -> list[list[Reply]]:
        """Different random samples of replies to each prompt."""
        seed = self.settings.seed
        names = [self._name("sample", p, self.max_new_tokens, samples, temperature, seed) for p in prompts]
        # Seeds that depend on the prompts: which prompts are computed together makes no difference.
        seeds = [int(token_hash(prompt)[:8], 16) for prompt in prompts]
        drawn = self._decode(
            sample_replies, names, prompts, guesses,
            seeds=seeds, samples=samples, temperature=temperature, seed=seed, hopeless=self._is_hopeless,
        )  # fmt: skip
        return [list({reply.tokens.tobytes(): reply for reply in replies}.values()) for replies in drawn]

    def searched(self, prompts: Rows, guesses: Rows, min_prob: float) -> list[list[Reply]]:
        """All replies to each prompt with at least this probability; good guesses make the search faster."""
        names = [self._name("search", prompt, self.max_new_tokens, min_prob) for prompt in prompts]
        return self._decode(search_replies, names, prompts, guesses, min_prob=min_prob)

    def _is_hopeless(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return not can_become_grid(text, self.encoder.format["lines_sep"])

    def _decode(
        self, decode: Callable[..., Any], names: Sequence[str], prompts: Rows, guesses: Rows,
        least: int = 0, seeds: Sequence[int] | None = None, **options: Any,
    ) -> list[list[Reply]]:  # fmt: skip
        # At least `least` replies of each name, saved as soon as they are computed. Equal names are computed once.
        values: dict[str, Any] = {}
        missing: dict[str, int] = {}
        for i, name in enumerate(names):
            if name not in values and name not in missing:
                value = self._stored(name, lambda value: _are_replies(value, len(self.tokenizer), least))
                if value is None:
                    missing[name] = i
                    continue
                values[name] = value
            self.progress.skipped()
        if missing:
            rows, model = list(missing.values()), self.model  # loaded first: the seconds are those of decoding
            begin, work = time.perf_counter(), Work()

            def save(i: int, replies: list[Reply]) -> None:
                name = names[rows[i]]
                value = [[reply.log_prob, reply.tokens.tolist()] for reply in replies]
                self.cache.set(name, value)
                values[name] = value
                self.progress.finished()

            if seeds is not None:
                options["seeds"] = [seeds[i] for i in rows]
            decode(
                model, "transformers", self.tokenizer, [prompts[i] for i in rows], max_new_tokens=self.max_new_tokens,
                guesses=[guesses[i] for i in rows], batch_size=self.batch_size, done=save, work=work, **options,
            )  # fmt: skip
            # Keep the batch size that fitted: each time memory runs out, the work of a batch is lost.
            self._batch_size = work.batch_size or self._batch_size
            self.seconds += time.perf_counter() - begin
        return [[Reply(np.array(ids, dtype=np.int64), log_prob) for log_prob, ids in values[name]] for name in names]

    def scored(self, prompts: Rows, replies: Sequence[Rows]) -> list[list[float]]:
        """Log probabilities of given replies to each prompt."""
        names = [self._name("scores", prompt) for prompt in prompts]
        marks = [[token_hash(reply) for reply in group] for group in replies]
        # One cache entry holds all scores of a prompt: there are many, and reading an entry has a fixed cost.
        known: dict[str, dict[str, float]] = {name: self._stored(name, _are_scores) or {} for name in set(names)}
        missing = {
            (name, mark): (prompt, reply)
            for name, prompt, group, group_marks in zip(names, prompts, replies, marks, strict=True)
            for reply, mark in zip(group, group_marks, strict=True)
            if mark not in known[name]
        }
        computed_names = {name for name, _ in missing}
        if missing:
            begin, work = time.perf_counter(), Work()
            computed = score_replies(
                self.model, "transformers", self.tokenizer, [p for p, _ in missing.values()],
                [r for _, r in missing.values()],
                batch_size=min(max(1, self.batch_size // 4), self._scoring_batch_size or self.batch_size), work=work,
            )  # fmt: skip
            self._scoring_batch_size = work.batch_size or self._scoring_batch_size
            for (name, mark), value in zip(missing, computed, strict=True):
                known[name][mark] = value
            with self.cache.transact():
                for name in computed_names:
                    self.cache.set(name, known[name])
            self.seconds += time.perf_counter() - begin
        finished = sum(name in computed_names for name in names)
        self.progress.finished(finished)
        self.progress.skipped(len(names) - finished)
        return [[known[name][mark] for mark in group] for name, group in zip(names, marks, strict=True)]

    def _name(self, kind: str, prompt: np.ndarray, *settings: Any) -> str:
        return f"{kind} {self.evaluated.identity} {token_hash(prompt)} {' '.join(map(str, settings))}"

    def _stored(self, name: str, is_good: Callable[[Any], bool]) -> Any:
        # The cached value, None: there is none. Another program may have written anything into the cache.
        value = self.cache.get(name)
        if value is not None and not is_good(value):
            raise UntrustedCacheError(self.cache.directory, f"an entry of another form ({name.split()[0]})")
        return value


def token_hash(tokens: np.ndarray) -> str:
    """A hash of token ids: names prompts and replies in the cache."""
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()[:32]


def longest_reply(encoder: SampleEncoder) -> int:
    """Tokens of the longest reply: a grid of 30 x 30 cells."""
    # Where digits merge, the length depends on the colours: try each colour alone, and some random grids.
    side, rng = MAX_SIDE, np.random.default_rng(0)
    grids = [np.full((side, side), colour, dtype=np.uint8) for colour in range(10)]
    if not encoder.one_token_per_cell:
        grids += [rng.integers(0, 10, size=(side, side), dtype=np.uint8) for _ in range(10)]
    return max(len(encoder.encode_reply(grid)) for grid in grids)


def _are_replies(value: Any, vocabulary: int, least: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= least
        and all(isinstance(reply, list) and len(reply) == 2 for reply in value)
        and all(type(log_prob) is float and isinstance(tokens, list) for log_prob, tokens in value)
        and all(type(token) is int and 0 <= token < vocabulary for _, tokens in value for token in tokens)
    )


def _are_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(type(score) is float for score in value.values())
