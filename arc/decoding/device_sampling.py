"""Samples of many prompts at once, with their tokens chosen on the device: the host only starts passes.

search_tools.sample_replies asks the device for every token, and takes as long on the host as a large GPU on the pass.
Here a pass, the choice of its tokens and the bookkeeping are one CUDA graph, which is started token after token; the
host looks only now and then which replies have ended. The random numbers and so the samples are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.prefix_cache import PrefixCache
from arc.decoding.rows import (
    PREFILL_TOKENS,
    Reply,
    Work,
    check_numbers,
    check_tokens,
    halve_on_out_of_memory,
    own_attention,
)
from arc.decoding.sampling import draw_tokens, random_draws
from arc.models.loading import decoding

if TYPE_CHECKING:
    import torch

LOOK = 16  # tokens between two looks at which replies have ended
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

        with decoding(self.model, "transformers"), own_attention(self.model, self._attend):
            halve_on_out_of_memory(run, min(batch_size, self.work.batch_size or batch_size, len(rows)), self.work)
        self._give_back()
        return [replies[at : at + samples] for at in range(0, len(rows), samples)]

    def _sample(self, prompts: Sequence[np.ndarray], draws: np.ndarray) -> list[Reply]:
        order, owners = by_prompt(prompts)
        rows = len(order)
        firsts = order[np.unique(owners, return_index=True)[1]]  # of the replies to each prompt
        prefixes = [prompts[at][:-1] for at in firsts]
        self._reserve(rows, len(prefixes), max(map(len, prefixes)))
        self.cache.begin([len(prefix) for prefix in prefixes], owners)
        self._prefill(prefixes)
        state = self.state
        state.begin([prompts[at] for at in order], draws[order])
        found: list[Reply | None] = [None] * rows
        live = order.copy()  # the number of the prompt of each row that is still decoded
        done = 0
        while len(live):
            for _ in range(min(LOOK, self.length - done)):
                self._step(len(live))
                done += 1
            alive = state.alive[: len(live)].cpu().numpy()
            if done == self.length or not alive.any():
                keep = np.zeros(0, dtype=np.int64)
            else:
                keep = np.sort(rows_to_keep(alive))
                if len(keep) == len(live):
                    continue
            dropped = np.setdiff1d(np.arange(len(live)), keep)
            for at, reply in zip(dropped, state.replies(dropped, self.end, done), strict=True):
                found[live[at]] = reply
            if len(keep):
                self.cache.move(keep, done)
                state.move(keep)
            live = live[keep]
        return found

    def _reserve(self, rows: int, prompts: int, width: int) -> None:
        # Room for replies and prompts; graphs stay valid as long as nothing moves.
        cache = self.cache
        if cache is None or rows > cache.rows or prompts > cache.prompts or width > cache.width:
            room = {"prompts": prompts, "rows": rows, "width": width}
            if cache is not None:
                room = {name: max(count, getattr(cache, name)) for name, count in room.items()}
            self._forget()
            cache = None  # its memory first
            self.cache = PrefixCache(self.model.config, **room, length=self.length, device=self.device)
            self.state = _State(room["rows"], self.length, self.device)

    def _attend(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.cache.attend(*args, **kwargs)

    def _prefill(self, prefixes: Sequence[np.ndarray]) -> None:
        # All but the last token of each prompt.
        import torch

        lengths = [max(1, len(prefix)) for prefix in prefixes]
        begin = 0
        while begin < len(prefixes):
            end = begin + 1
            while end < len(prefixes) and (end + 1 - begin) * max(lengths[begin : end + 1]) <= PREFILL_TOKENS:
                end += 1
            # The room is made with the first pass, so one is made for prompts of a single token too.
            width = max(lengths[begin:end])
            ids = np.zeros((end - begin, width), dtype=np.int64)
            for row, prefix in enumerate(prefixes[begin:end]):
                ids[row, : len(prefix)] = prefix  # padded on the right, which nothing sees
            self.cache.begin_prompts(begin, width)
            places = torch.arange(width, device=self.device).expand(len(ids), width)
            self.model(
                input_ids=torch.from_numpy(ids).to(self.device), position_ids=places, attention_mask=None,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            begin = end

    def _step(self, rows: int) -> None:
        # One token more for each of the first `rows` rows.
        if not self.on_cuda:
            self._pass(rows)()
            return
        key = (rows, self.cache.count, self.cache.most)
        if key not in self.graphs:
            self.graphs[key] = self._capture(self._pass(rows))
        self.graphs[key].replay()

    def _pass(self, rows: int) -> Callable[[], None]:
        state = self.state

        def run() -> None:
            self.cache.begin_step(rows, state.done[0])
            logits = self.model(
                input_ids=state.ids[:rows], position_ids=state.places[:rows], attention_mask=None,
                past_key_values=self.cache, use_cache=True, logits_to_keep=0,
            ).logits  # fmt: skip
            state.take(logits, rows, self.temperature, self.end)

        return run

    def _capture(self, run: Callable[[], None]) -> Any:
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
        return graph

    def _give_back(self) -> None:
        # What is kept must not be missed by the training.
        import torch

        if not self.on_cuda or self.cache is None:
            return
        if self.cache.bytes > KEPT * torch.cuda.get_device_properties(self.device).total_memory:
            self._forget()

    def _forget(self) -> None:
        self.cache: PrefixCache | None = None
        self.state: _State | None = None
        self.graphs: dict[tuple[int, int, int], Any] = {}  # by rows, prompts and most rows of one prompt
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

    def move(self, keep: np.ndarray) -> None:
        """Have the first rows be those given, int64."""
        import torch

        rows = torch.from_numpy(keep).to(self.ids.device)
        for part in self.parts:
            part[: len(rows)] = part[rows]

    def copy(self) -> list[torch.Tensor]:
        """All of it."""
        return [part.clone() for part in (*self.parts, self.done)]

    def restore(self, copies: Sequence[torch.Tensor]) -> None:
        """Be as when it was copied."""
        for part, copied in zip((*self.parts, self.done), copies, strict=True):
            part.copy_(copied)


def by_prompt(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """An order of prompts in which equal ones stand together.

    Returns:
        The order, int64 (prompts,), and the number of each one's prompt among those that differ, ascending from 0.
    """
    numbers: dict[bytes, int] = {}
    keys = [np.asarray(prompt, dtype=np.int64).tobytes() for prompt in prompts]
    owners = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    return order, owners[order]


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
