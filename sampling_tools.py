"""Samples of many prompts at once, with their tokens chosen on the device: the host only starts passes.

search_tools.sample_replies asks the device for every token, and takes as long on the host as a large GPU on the pass.
Here a pass, the choice of its tokens and the bookkeeping are one CUDA graph, which is started token after token; the
host looks only now and then which replies have ended. The random numbers and so the samples are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from decoder_tools import (
    PREFILL_TOKENS,
    RowCache,
    Work,
    check_numbers,
    check_tokens,
    halve_on_out_of_memory,
    round_up,
    row_attention,
)
from model_tools import decoding
from search_tools import Reply, draw_tokens, random_draws

if TYPE_CHECKING:
    import torch

LOOK = 16  # tokens between two looks at which replies have ended
WIDTH_STEP = 256  # columns of the cache by which one graph sees more than another
KEPT = 1 / 8  # share of a GPU's memory that cache and graphs may keep between two calls


class DeviceSampler:
    """Samples replies; keeps its cache and graphs for the next call, which may come after the weights have changed.

    Args:
        model: of transformers, without adapters. Its weights may change between calls, in place.
        end: the end token.
        max_new_tokens: longest reply; one that has not ended by then has no end token.
        temperature: logits are divided by it; 0: greedy.
    """

    def __init__(self, model: Any, end: int, *, max_new_tokens: int, temperature: float = 1.0):
        """See the class."""
        self.model, self.end, self.length, self.temperature = model, end, max_new_tokens, temperature
        self.device = model.get_input_embeddings().weight.device
        self.on_cuda = self.device.type == "cuda"
        self.work = Work()  # remembers the batch that fitted, where memory ran out
        self.stream: torch.cuda.Stream | None = None  # on which graphs are captured
        self._forget()

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        samples: int = 1,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 128,
    ) -> list[list[Reply]]:
        """Replies to each prompt; prompts that are equal are computed once.

        Args:
            prompts: int64 (tokens,) each, not empty.
            samples: replies of each prompt.
            seed: of the random numbers, from 0.
            seeds: a number from 0 for each prompt, in place of 0, 1 and so on. Each reply's numbers depend on the seed,
                this number and the sample's alone, as in search_tools.sample_replies.
            batch_size: replies decoded at once; where memory runs out, half as many.

        Returns:
            For each prompt its samples.

        Raises:
            ValueError: tokens that the model has not, or a model that answers with NaN.
            torch.OutOfMemoryError: not even one reply fits.
        """
        check_tokens(self.model, "prompt", prompts)
        numbers = list(range(len(prompts)) if seeds is None else seeds)
        draws = np.stack([random_draws(seed, numbers, self.length, k) for k in range(samples)], axis=1)
        draws = draws.reshape(len(prompts) * samples, self.length)
        rows = [prompt for prompt in prompts for _ in range(samples)]
        replies: list[Reply] = []

        def run(size: int) -> None:
            try:
                while len(replies) < len(rows):
                    part = slice(len(replies), len(replies) + size)
                    replies.extend(self._sample(rows[part], draws[part]))
            except BaseException:
                self._forget()  # memory that ran out is wanted for the next try
                raise

        with decoding(self.model, "transformers"), row_attention(self.model):
            halve_on_out_of_memory(run, min(batch_size, self.work.batch_size or batch_size, len(rows)), self.work)
        self._give_back()
        return [replies[at : at + samples] for at in range(0, len(rows), samples)]

    def _sample(self, prompts: Sequence[np.ndarray], draws: np.ndarray) -> list[Reply]:
        order, sources = shared_first(prompts)
        longest = max(map(len, prompts))
        rows = len(order)
        self._reserve(rows, longest + self.length)
        self._prefill([prompts[at] for at in order], sources)
        state = self.state
        state.begin([prompts[at] for at in order], draws[order])
        found: list[Reply | None] = [None] * rows
        live = np.array(order)  # the number of the prompt of each row that is still decoded
        done = 0
        while len(live):
            for _ in range(min(LOOK, self.length - done)):
                self._step(len(live), round_up(longest + done, WIDTH_STEP))
                done += 1
            alive = state.alive[: len(live)].cpu().numpy()
            if done == self.length or not alive.any():
                keep = np.zeros(0, dtype=np.int64)
            else:
                keep = rows_to_keep(alive)
                if len(keep) == len(live):
                    continue
            dropped = np.setdiff1d(np.arange(len(live)), keep)
            for at, reply in zip(dropped, state.replies(dropped, self.end, done), strict=True):
                found[live[at]] = reply
            self._move(keep, longest + done)
            live = live[keep]
        return found

    def _reserve(self, rows: int, columns: int) -> None:
        # Room for rows and columns; graphs stay valid as long as nothing moves.
        width = round_up(columns, WIDTH_STEP)
        if self.cache is None or rows > self.cache.rows or width > self.width:
            self._forget()
            self.cache, self.width = RowCache(rows), width
            self.state = _State(rows, self.length, self.device)

    def _prefill(self, prompts: Sequence[np.ndarray], sources: np.ndarray) -> None:
        # All but the last token of each prompt; of equal ones the first is computed, the others are copied.
        import torch

        first = len(prompts) - len(sources)  # rows from here on are copies
        widths = [len(prompt) - 1 for prompt in prompts[:first]]
        begin = 0
        while begin < first:
            end = begin + 1
            while end < first and (end + 1 - begin) * max(widths[begin : end + 1]) <= PREFILL_TOKENS:
                end += 1
            # The room is made with the first pass, so one is made for prompts of a single token too.
            width = max([1, *widths[begin:end]])
            ids = np.zeros((end - begin, width), dtype=np.int64)
            for row, prompt in enumerate(prompts[begin:end]):
                ids[row, : len(prompt) - 1] = prompt[:-1]  # padded on the right, where what follows writes over it
            if not self.cache.layers:
                self._make_layers(ids[:1, :1])
            self.cache.begin_prompts(begin, width)
            places = torch.arange(width, device=self.device).expand(len(ids), width)
            self.model(
                input_ids=torch.from_numpy(ids).to(self.device), position_ids=places, attention_mask=None,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            begin = end
        if len(sources):
            rows = torch.from_numpy(sources).to(self.device)
            for stored in (part for layer in self.cache.layers for part in layer):
                width = max(widths)
                stored[first : first + len(sources), :, :width] = stored[rows, :, :width]

    def _make_layers(self, ids: np.ndarray) -> None:
        # A first pass over one token makes the cache's tensors; then they get all the room that there will be.
        import torch

        self.cache.begin_prompts(0, 1)
        self.model(
            input_ids=torch.from_numpy(ids).to(self.device), attention_mask=None,
            position_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.device), past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache.reserve(self.width)

    def _step(self, rows: int, width: int) -> None:
        # One token more for each of the first `rows` rows, which see `width` columns.
        if not self.on_cuda:
            self._pass(rows, width)()
            return
        if (rows, width) not in self.graphs:
            self.graphs[rows, width] = self._capture(self._pass(rows, width))
        self.graphs[rows, width][0].replay()

    def _pass(self, rows: int, width: int) -> Callable[[], None]:
        import torch

        state = self.state
        self.cache.begin_step(list(range(rows)), state.places[:rows], width)
        slots = self.cache._slots  # a graph reads it: it has to live as long

        def run() -> None:
            places = state.places[:rows]
            mask = torch.arange(width, device=self.device) <= places[:, None, :, None]
            logits = self.model(
                input_ids=state.ids[:rows], position_ids=places, attention_mask=mask, past_key_values=self.cache,
                use_cache=True, logits_to_keep=0,
            ).logits  # fmt: skip
            state.take(logits, rows, self.temperature, self.end)

        run.slots = slots
        return run

    def _capture(self, run: Callable[[], None]) -> tuple[Any, Callable[[], None]]:
        import torch

        before = self.state.copy()
        if self.stream is None:
            # One for all: each stream that multiplies matrices is given a workspace of its own, which it keeps.
            self.stream = torch.cuda.Stream()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # what libraries set up when they are first called is no part of a graph
                run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # One pool for all: graphs run one after the other, and nothing in it is read by another. Other threads may go
        # on with what they do, such as pinning the memory of batches.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            run()
        self.state.restore(before)
        return graph, run

    def _move(self, keep: np.ndarray, width: int) -> None:
        # The rows that go on, to the front.
        import torch

        if not len(keep):
            return
        rows = torch.from_numpy(keep).to(self.device)
        for stored in (part for layer in self.cache.layers for part in layer):
            stored[: len(keep), :, :width] = stored[rows, :, :width]
        self.state.move(rows)

    def _give_back(self) -> None:
        # What is kept must not be missed by the training.
        import torch

        if not self.on_cuda or self.cache is None:
            return
        held = sum(part.numel() * part.element_size() for layer in self.cache.layers for part in layer)
        if held > KEPT * torch.cuda.get_device_properties(self.device).total_memory:
            self._forget()

    def _forget(self) -> None:
        self.cache: RowCache | None = None
        self.state: _State | None = None
        self.width = 0
        # By rows and width: the graph, and what it reads and nothing else keeps alive.
        self.graphs: dict[tuple[int, int], tuple[Any, Callable[[], None]]] = {}
        self.pool: Any = None  # of the graphs' memory


class _State:
    """What is known of the rows, on the device: all have come equally far.

    Args:
        rows: of the batch.
        length: tokens of the longest reply.
        device: where.
    """

    def __init__(self, rows: int, length: int, device: torch.device):
        import torch

        self.ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)  # the token to feed
        self.places = torch.zeros_like(self.ids)  # and its column
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.draws = torch.zeros((rows, length), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        self.log_probs = torch.zeros((rows, length), dtype=torch.float64, device=device)
        self.done = torch.zeros((1, 1), dtype=torch.int64, device=device)  # tokens of each row
        self.parts = [self.ids, self.places, self.alive, self.draws, self.tokens, self.log_probs]

    def begin(self, prompts: Sequence[np.ndarray], draws: np.ndarray) -> None:
        """Start with the last token of each prompt."""
        import torch

        rows = len(prompts)
        self.ids[:rows, 0] = torch.tensor([int(prompt[-1]) for prompt in prompts])
        self.places[:rows, 0] = torch.tensor([len(prompt) - 1 for prompt in prompts])
        self.draws[:rows] = torch.from_numpy(draws)
        self.alive[:rows] = True
        self.done.zero_()

    def take(self, logits: torch.Tensor, rows: int, temperature: float, end: int) -> None:
        """Choose a token for each row after its logits (rows, 1, vocabulary), and go on to the next."""
        at = self.done.clamp(max=self.draws.shape[1] - 1).expand(rows, 1)
        tokens, log_probs = draw_tokens(logits, self.draws[:rows].gather(1, at)[..., None], temperature)
        self.tokens[:rows].scatter_(1, at, tokens)
        self.log_probs[:rows].scatter_(1, at, log_probs)
        self.ids[:rows] = tokens
        alive = self.alive[:rows]
        alive &= tokens[:, 0] != end
        self.places[:rows] += alive[:, None]  # one that has ended stays where it is
        self.done += 1

    def replies(self, rows: np.ndarray, end: int, done: int) -> list[Reply]:
        """What rows have come to after so many tokens."""
        tokens, log_probs = (part.cpu().numpy()[rows] for part in (self.tokens, self.log_probs))
        found = []
        for path, values in zip(tokens[:, :done], log_probs[:, :done], strict=True):
            ends = np.flatnonzero(path == end)
            length = ends[0] + 1 if len(ends) else done
            check_numbers(values[:length])
            found.append(Reply(path[:length].copy(), float(values[:length].sum())))
        return found

    def move(self, rows: torch.Tensor) -> None:
        """Have the first rows be those given."""
        for part in self.parts:
            part[: len(rows)] = part[rows]

    def copy(self) -> list[torch.Tensor]:
        """All of it."""
        return [part.clone() for part in (*self.parts, self.done)]

    def restore(self, copies: Sequence[torch.Tensor]) -> None:
        """Be as when it was copied."""
        for part, copied in zip((*self.parts, self.done), copies, strict=True):
            part.copy_(copied)


def shared_first(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """An order of prompts in which each different one comes first once, and then the others.

    Returns:
        The order, int64 (prompts,), and for each of the others the place in the order of the one that it equals.
    """
    places: dict[bytes, int] = {}
    first, others, sources = [], [], []
    for number, prompt in enumerate(prompts):
        key = np.asarray(prompt, dtype=np.int64).tobytes()
        if key in places:
            others.append(number)
            sources.append(places[key])
        else:
            places[key] = len(first)
            first.append(number)
    return np.array(first + others, dtype=np.int64), np.array(sources, dtype=np.int64)


def rows_to_keep(alive: np.ndarray) -> np.ndarray:
    """Rows that go on: those alive, and as many others as make half of all, or a quarter, and so on.

    So there are few numbers of rows, each of which has graphs of its own.

    Args:
        alive: bool (rows,).
    """
    rows = size = len(alive)
    while size % 2 == 0 and size // 2 >= max(8, alive.sum()):
        size //= 2
    if size == rows:
        return np.arange(rows)
    living, ended = np.flatnonzero(alive), np.flatnonzero(~alive)
    return np.concatenate([living, ended[: size - len(living)]])
