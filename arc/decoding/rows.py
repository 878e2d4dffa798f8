"""Decoding of many prompts at once on one key-value cache, whose rows advance and rewind independently.

The time of decoding depends on the number of forward passes, hardly on their tokens: each pass reads all weights. So
all rows advance together. A pass may carry several tokens of a row (a draft). A waiting row replaces a finished one.
Equal prompts are computed once.

A token's column in the cache is its position in its row, so the length says what a row holds. A search goes back to an
earlier branch by a smaller length. Nothing is cleared: a token attends only to positions up to its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.library_patches import choose_attention
from arc.models.loading import decoding
from arc.models.packing import check_full_attention
from arc.models.prompt_sharing import round_up

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Reply:
    """A reply and its probability."""

    tokens: np.ndarray  # int64 (tokens,), with the end token if there is one
    log_prob: float  # natural logarithm of the probability of all tokens after the prompt


Choose = Callable[["torch.Tensor", Sequence[Any]], tuple[np.ndarray, np.ndarray]]  # see `decode_rows`
LOGIT_BYTES = 2**30  # limit of one pass, in float64: with a whole vocabulary, 64 rows of 100 tokens would take 6 GB
MASK_BYTES = 2**32  # limit of one pass, as bool and as numbers: a mask grows with the square of a row's length
PREFILL_TOKENS = 2**14  # limit of one pass over prompts: more tokens are hardly faster and take memory
CACHE_STEP = 256  # columns by which the cache grows
MASK_STEP = 16  # attention kernels need the length of their masks aligned
ATTENTION = "arc_decoding"  # the name under which transformers knows the attention


class UndecodableModelError(ValueError):
    """A model that cannot be decoded: its attention is not full, it answers with NaN, or its tokenizer is another's."""


class NonFiniteAnswersError(UndecodableModelError):
    """A model that answers with NaN, as after a training that diverged."""


@dataclass
class Work:
    """The cost of decoding; the functions that get one add to it."""

    passes: int = 0  # forward passes, also those over prompts
    prompt_tokens: int = 0  # that went through the model
    reply_tokens: int = 0  # that went through the model, also those of wrong drafts
    seen_tokens: int = 0  # tokens in the cache that passes over replies read, once per row and pass
    batch_size: int | None = None  # rows that fit into memory after it ran out; None: it never ran out


class Row:
    """One row of a batch: feeds its last token and a draft, and takes the tokens that the model chooses.

    See `search.search_replies`; `number` is the prompt's, `end` the end token.
    """

    def __init__(
        self, number: int, prompt: np.ndarray, guess: np.ndarray | None, end: int, max_new_tokens: int,
        draft_tokens: int,
    ):  # fmt: skip
        self.number, self.end, self.max_new_tokens, self.draft_tokens = number, end, max_new_tokens, draft_tokens
        self.prompt = [int(token) for token in prompt]
        self.guess = [int(token) for token in guess] if guess is not None else []
        if end in self.guess:  # it is never fed: nothing comes after it
            del self.guess[self.guess.index(end) :]
        self.draft = len(self.guess)  # tokens to draft next
        self.drafted: list[int] = []
        self.path: list[int] = []  # tokens after the prompt; the last token of both has not been fed yet
        self.log_prob = 0.0  # of the path
        self.is_open = True

    def feed(self) -> list[int]:
        """The last token, which has not been fed yet, and a draft."""
        at = len(self.path)
        self.drafted = self.guess[at : min(at + self.draft, self.max_new_tokens - 1)]
        return [self.path[-1] if self.path else self.prompt[-1], *self.drafted]

    def take(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Take the choices after each fed token, (fed, ...); sets `path` and `is_open`."""
        raise NotImplementedError

    def adapt_draft(self, right: int) -> None:
        """Choose the next draft's length, after so many right tokens of this one."""
        # At least 1: a guess whose first token is wrong may be right after it.
        self.draft = min(self.draft_tokens, max(1, 2 * right if right == len(self.drafted) else right))


def decode_rows(
    model: Any, engine: str, rows: Sequence[Row], batch_size: int, choose: Choose, finish: Callable[[Any], None],
    work: Work | None,
) -> None:  # fmt: skip
    """Advance rows until none is open.

    Args:
        model, engine, batch_size, work: see `search.search_replies`.
        choose: makes tokens and log probabilities, each (rows, fed, ...), from logits (rows, fed, vocabulary) and their
            rows. Each row takes its slice.
        finish: called with each row that has ended.

    Raises:
        ValueError: a model or engine that cannot be decoded here, or a model that answers with NaN.
        torch.OutOfMemoryError: not even one row fits.
    """
    if engine != "transformers":
        reason = "cannot decode rows of different lengths on one cache"
        raise ValueError(f"engine {engine} {reason}: load the model with --engine transformers")
    waiting: list[Row] = list(rows)
    live: list[Row] = []

    def run(size: int) -> None:
        # After memory has run out the cache is gone: open rows start again from the path that they have reached.
        waiting.extend(row for row in live if row.is_open)
        for row in live:
            if not row.is_open:
                finish(row)
        live.clear()
        # The longest rows first: too large a batch fails at once, and the cache seldom grows.
        waiting.sort(key=lambda row: -_length(row))
        decoder = _Decoder(model, min(size, len(waiting)), work or Work())
        while waiting or live:
            while waiting and (not live or size - len(live) >= max(1, size // 8)):  # several at a time
                decoder.admit(waiting, live, size - len(live))
            decoder.advance(live, choose)
            for at in reversed(range(len(live))):
                if not live[at].is_open:
                    finish(live[at])
                    last = live.pop()
                    if at < len(live):
                        decoder.cache.copy(len(live), at, _length(last))
                        live[at] = last

    with decoding(model, engine), row_attention(model):
        halve_on_out_of_memory(run, batch_size, work)


def _length(row: Row) -> int:
    # Tokens of a row that are in the cache.
    return len(row.prompt) + len(row.path) - 1


class _Decoder:
    # A model and its cache; the first rows of the cache are the live ones.

    def __init__(self, model: Any, rows: int, work: Work):
        self.model, self.work = model, work
        self.device = model.get_input_embeddings().weight.device
        self.cache = RowCache(rows)

    def admit(self, waiting: list[Row], live: list[Row], count: int) -> None:
        """Move up to `count` rows from waiting to live, and compute all but their last token; equal rows once."""
        prefixes: dict[tuple[int, ...], list[Row]] = {}
        for row in waiting[:count]:
            prefix = (*row.prompt, *row.path)[:-1]
            if prefix not in prefixes and prefixes and (len(prefixes) + 1) * len(next(iter(prefixes))) > PREFILL_TOKENS:
                break
            prefixes.setdefault(prefix, []).append(row)
        first = len(live)
        width = max(map(len, prefixes))
        if width:
            fill_prompts(self.model, self.cache, first, list(prefixes), width)
            self.work.passes += 1
            self.work.prompt_tokens += sum(map(len, prefixes))
        admitted = [members[0] for members in prefixes.values()]
        for at, (prefix, members) in enumerate(prefixes.items(), first):
            for row in members[1:]:
                self.cache.copy(at, first + len(admitted), len(prefix))
                admitted.append(row)
        live += admitted  # only now: if memory had run out, they would still wait
        chosen = {id(row) for row in admitted}
        waiting[:] = [row for row in waiting if id(row) not in chosen]

    def advance(self, live: Sequence[Row], choose: Choose) -> None:
        """Feed every row once. Rows with long drafts get passes of their own: the others would be padded to them."""
        feeds = [row.feed() for row in live]
        limit = 2 * min(map(len, feeds)) + 32
        long = [at for at, feed in enumerate(feeds) if len(feed) > limit]
        short = [at for at, feed in enumerate(feeds) if len(feed) <= limit]
        for chosen in (short, sorted(long, key=lambda at: -len(feeds[at]))):
            while chosen:
                longest = max(len(feeds[at]) for at in chosen)
                seen = max(_length(live[at]) for at in chosen) + longest
                batch = chosen[: affordable_rows(len(chosen), self.model, longest, (longest, seen))]
                chosen = chosen[len(batch) :]
                tokens, log_probs = choose(self._step(batch, live, feeds), [live[at] for at in batch])
                check_numbers(log_probs)
                for row, at in enumerate(batch):
                    live[at].take(tokens[row], log_probs[row])

    def _step(self, batch: Sequence[int], live: Sequence[Row], feeds: Sequence[Sequence[int]]) -> torch.Tensor:
        # Logits (batch, fed, vocabulary).
        import torch

        fed = max(len(feeds[at]) for at in batch)
        begins = np.array([_length(live[at]) for at in batch], dtype=np.int64)
        ids = np.zeros((len(batch), fed), dtype=np.int64)
        for row, at in enumerate(batch):
            ids[row, : len(feeds[at])] = feeds[at]
        columns = begins[:, None] + np.arange(fed)
        positions = torch.from_numpy(columns).to(self.device)
        width = round_up(int(columns.max()) + 1, MASK_STEP)
        self.cache.begin_step(list(batch), positions, width)
        mask = torch.arange(width, device=self.device) <= positions[:, None, :, None]
        fed_tokens = sum(len(feeds[at]) for at in batch)
        self.work.passes += 1
        self.work.reply_tokens += fed_tokens
        self.work.seen_tokens += int(begins.sum()) + fed_tokens
        return cached_logits(self.model, self.cache, torch.from_numpy(ids).to(self.device), positions, mask)


def fill_prompts(model: Any, cache: Any, first: int, prompts: Sequence[Sequence[int] | np.ndarray], width: int) -> None:
    """Compute prompts of up to `width` tokens into the rows of a cache from `first` on."""
    import torch

    device = model.get_input_embeddings().weight.device
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt  # padded on the right, where no token looks
    cache.begin_prompts(first, width)
    positions = torch.arange(width, device=device).expand(len(prompts), width)
    cached_logits(model, cache, torch.from_numpy(ids).to(device), positions, logits_to_keep=1)


def cached_logits(
    model: Any, cache: Any, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None,
    logits_to_keep: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Logits (rows, fed, vocabulary) of a pass over a cache."""
    return model(
        input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True,
        logits_to_keep=logits_to_keep,
    ).logits  # fmt: skip


# -- cache and attention


class RowCache:
    """Keys and values of a batch whose rows have different lengths, for the attention layers of transformers.

    It has the method of transformers' Cache that attention layers call, `update`. The caller says before each pass
    where the tokens go, so rows are filled, rewound and copied independently. A DynamicCache is cropped for all rows at
    once, a StaticCache writes all rows at one position. The mask hides the leftovers behind a row's tokens.
    """

    is_compileable = False

    def __init__(self, rows: int):
        self.rows = rows
        # Keys and values of each layer, each (rows, heads, columns, size of a head), made at the first pass.
        self.layers: list[list[torch.Tensor]] = []

    def begin_prompts(self, first: int, width: int) -> None:
        """The next pass fills the rows from `first` on, from column 0, and attends to nothing else."""
        self._is_prompt, self._first, self._width = True, first, width

    def begin_step(self, rows: list[int], columns: torch.Tensor, width: int) -> None:
        """The next pass writes into `columns` (rows, fed) of the rows and attends to their first `width` columns."""
        import torch

        self._is_prompt, self._columns, self._width = False, columns, width
        self._slots = torch.tensor(rows, device=columns.device)[:, None]
        # The first rows are read in place, other rows are gathered.
        self._seen = slice(len(rows)) if rows == list(range(len(rows))) else self._slots[:, 0]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values, (rows, heads, fed, size of a head), and return all it attends to."""
        layer = self._layer(layer_idx, keys, values)
        if self._is_prompt:
            for stored, new in zip(layer, (keys, values), strict=True):
                stored[self._first : self._first + len(new), :, : self._width] = new
            return keys, values
        for stored, new in zip(layer, (keys, values), strict=True):
            stored[self._slots, :, self._columns] = new.transpose(1, 2)
        seen_keys, seen_values = (stored[self._seen, :, : self._width] for stored in layer)
        return seen_keys, seen_values

    def _layer(self, number: int, *new: torch.Tensor) -> list[torch.Tensor]:
        while len(self.layers) <= number:
            self.layers.append([tensor.new_zeros((self.rows, tensor.shape[1], 0, tensor.shape[3])) for tensor in new])
        layer = self.layers[number]
        missing = self._width - layer[0].shape[2]
        if missing > 0:
            # Zeros, since a mask does not hide NaN. One tensor at a time, so that little is held twice.
            missing = round_up(missing, CACHE_STEP)
            for at, stored in enumerate(layer):
                grown = stored.new_zeros((*stored.shape[:2], stored.shape[2] + missing, stored.shape[3]))
                grown[:, :, : stored.shape[2]] = stored
                layer[at] = grown
        return layer

    def copy(self, source: int, target: int, length: int) -> None:
        """Make row `target` hold the first `length` tokens of row `source`."""
        for layer in self.layers:
            for stored in layer:
                stored[target, :, :length] = stored[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the cache; models may ask, but use the positions and the mask that they are called with."""
        return self.layers[layer_idx][0].shape[2] if layer_idx < len(self.layers) else 0


@contextlib.contextmanager
def row_attention(model: Any) -> Iterator[None]:
    """As `chosen_attention`, with an attention for the masks of `RowCache`.

    With a mask, transformers' attention copies keys and values for each query head that shares them.
    """
    attention = _GroupedAttention()
    try:
        with chosen_attention(model, attention):
            yield
    finally:
        attention.prepared = None  # transformers keeps the function


@contextlib.contextmanager
def chosen_attention(model: Any, attention: Callable[..., tuple[torch.Tensor, None]]) -> Iterator[None]:
    """Give a model an attention function of transformers' interface for as long as the context lasts.

    Raises:
        UndecodableModelError: a model whose attention is not full, or cannot be chosen.
    """
    try:
        check_full_attention(model.config)
        undo = choose_attention(model, ATTENTION, attention)
    except ValueError as error:
        raise UndecodableModelError(f"{error}: not supported") from None
    try:
        yield
    finally:
        undo()


class _GroupedAttention:
    # Attention of transformers' interface for the masks of `RowCache`.

    prepared: tuple[torch.Tensor, torch.Tensor] | None = None  # the last mask, and the bias made of it

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        # query (rows, query heads, fed, size), key and value (rows, heads, seen, size). Mask: bool (rows, 1, fed,
        # seen), True where a query attends; None: causal, as many seen as fed. Returns (rows, fed, query heads, size).
        from torch.nn.functional import scaled_dot_product_attention

        rows, heads, fed, size = query.shape
        groups = heads // key.shape[1]
        if attention_mask is None:
            options = {"is_causal": True, "scale": scaling, "enable_gqa": groups > 1}
            out = scaled_dot_product_attention(query, key, value, **options)
        else:
            # Query heads that share keys become more queries of one head.
            folded = query.reshape(rows, key.shape[1], groups * fed, size)
            bias = self._bias_of(attention_mask, groups, query.dtype)
            out = scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scaling)
            out = out.reshape(rows, heads, fed, value.shape[-1])
        return out.transpose(1, 2).contiguous(), None

    def _bias_of(self, mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
        # All layers get the same mask. From a bool mask torch would make the bias in each layer: three more kernels.
        if self.prepared is None or self.prepared[0] is not mask or self.prepared[1].dtype != dtype:
            repeated = mask if mask.shape[2] == 1 else mask.repeat(1, 1, groups, 1)
            bias = mask.new_zeros(repeated.shape, dtype=dtype).masked_fill_(~repeated, -math.inf)
            self.prepared = mask, bias
        return self.prepared[1]


# -- memory and checks


def halve_on_out_of_memory(run: Callable[[int], Any], batch_size: int, work: Work | None = None) -> Any:
    """Call `run(batch_size)`, and again with half the batch each time memory runs out.

    (accelerate's `find_executable_batch_size` frees the memory while the error still holds the tensors.)

    Args:
        run: works with batches of the given size; called again, it continues where it stopped.
        work: gets the size that fits, so that the caller can start with it the next time.

    Raises:
        torch.OutOfMemoryError: a batch of 1 does not fit.
    """
    import torch
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return run(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        # Outside of `except`: there the error holds the frames, and with them the tensors that filled the memory.
        batch_size //= 2
        print(f"out of memory: going on with batches of {batch_size}")
        if work is not None:
            work.batch_size = batch_size
        clear_device_cache()


def check_generation_settings(max_new_tokens: int, batch_size: int) -> None:
    """Raise ValueError unless both are at least 1."""
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size are {max_new_tokens} and {batch_size}: expected at least 1")


def check_guesses(
    model: Any, prompts: Sequence[np.ndarray], guesses: Sequence[np.ndarray | None] | None
) -> list[np.ndarray | None]:
    """Check prompts and guesses as `check_tokens`; the guess of each prompt, None where it has none or an empty one."""
    if guesses is not None and len(guesses) != len(prompts):
        raise ValueError(f"found {len(guesses)} guesses for {len(prompts)} prompts")
    check_tokens(model, "prompt", prompts)
    checked = [guess if guess is not None and len(guess) else None for guess in guesses or [None] * len(prompts)]
    check_tokens(model, "guess", checked)
    return checked


def check_tokens(model: Any, name: str, rows: Sequence[np.ndarray | None]) -> None:
    """Refuse token ids that a model does not have: on a CUDA device they would end the process.

    Raises:
        ValueError: a row is empty, or (UndecodableModelError) has such a token. A row of None is skipped.
    """
    size = model.get_input_embeddings().weight.shape[0]
    for number, row in enumerate(rows):
        if row is not None and not len(row):
            raise ValueError(f"{name} {number} is empty: expected at least one token")
        if row is not None and not 0 <= np.min(row) <= np.max(row) < size:
            least, most = np.min(row), np.max(row)
            raise UndecodableModelError(f"{name} {number} has tokens from {least} to {most}, the model {size:,}")


def check_numbers(log_probs: Any) -> None:
    """Raise NonFiniteAnswersError if a log probability is NaN."""
    if np.isnan(log_probs).any():
        raise NonFiniteAnswersError("the model answers with numbers that are none (NaN): nothing can be decoded")


def affordable_rows(count: int, model: Any, logits: int, mask: tuple[int, int] | None) -> int:
    """How many of `count` rows have logits and attention masks that fit into LOGIT_BYTES and MASK_BYTES; at least 1.

    Args:
        logits: columns of logits of each row.
        mask: the shape of each mask, (fed, seen), or None.
    """
    config = model.config
    count = min(count, LOGIT_BYTES // (8 * config.vocab_size * logits))
    if mask is not None:
        heads = config.num_attention_heads
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        # The bool mask; for each query head that shares keys two more and the bias: see `_GroupedAttention`.
        size = mask[0] * mask[1] * (1 + groups * (2 + model.get_input_embeddings().weight.element_size()))
        count = min(count, MASK_BYTES // size)
    return max(1, count)
