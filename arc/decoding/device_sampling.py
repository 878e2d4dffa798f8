"""Sampling on the device: the GPU chooses the tokens, and the host only starts the passes.

`sampling.sample_replies` waits for the device at every token; on a large GPU the host then takes as long as the pass.
Here one CUDA graph holds a pass, the choice of the tokens and the bookkeeping. The host looks every few tokens which
replies have ended. The random numbers, and so the samples, are the same.
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
    cached_logits,
    check_numbers,
    check_tokens,
    chosen_attention,
    fill_prompts,
    halve_on_out_of_memory,
)
from arc.decoding.sampling import draw_tokens, random_draws
from arc.models.loading import decoding

if TYPE_CHECKING:
    import torch

LOOK = 16  # tokens between two looks at which replies have ended
KEPT = 1 / 8  # share of the GPU memory that cache and graphs may hold between two calls


class DeviceSampler:
    """Samples replies. Cache and graphs stay for the next call; the weights may change in place between calls.

    Args:
        model: of transformers, without adapters.
        max_new_tokens: a reply that is cut off there has no end token.
        temperature: logits are divided by it; 0: greedy.
    """

    def __init__(self, model: Any, end: int, *, max_new_tokens: int, temperature: float = 1.0):
        self.model, self.end, self.length, self.temperature = model, end, max_new_tokens, temperature
        self.device = model.get_input_embeddings().weight.device
        self.on_cuda = self.device.type == "cuda"
        self.work = Work()  # remembers the batch that fitted, where memory ran out
        self.stream: torch.cuda.Stream | None = None  # on which graphs are captured
        self._forget()

    def _forget(self) -> None:
        # Frees the memory of cache and graphs; `_reserve` makes them again.
        self.cache: Any = None  # a PrefixCache
        self.state: Any = None  # a _State
        self.graphs: dict[tuple[int, int, int], Any] = {}  # by rows, prompts and most rows of one prompt
        self.pool: Any = None  # memory of the graphs

    def sample(
        self, prompts: Sequence[np.ndarray], *, samples: int = 1, seed: int = 0, seeds: Sequence[int] | None = None,
        batch_size: int = 128,
    ) -> list[list[Reply]]:  # fmt: skip
        """Sample replies to each prompt; equal prompts are computed once.

        Args:
            prompts: int64 (tokens,) each, not empty.
            samples, seed, seeds: see `sampling.sample_replies`.
            batch_size: replies decoded at once; where memory runs out, half as many.

        Returns:
            For each prompt its samples.

        Raises:
            ValueError: tokens that the model does not have, or a model that answers with NaN.
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
                    batch = slice(len(replies), len(replies) + size)
                    replies.extend(self._sample(rows[batch], draws[batch]))
            except BaseException:
                self._forget()  # the next try needs the memory
                raise

        with (
            decoding(self.model, "transformers"),
            chosen_attention(self.model, lambda *args, **kwargs: self.cache.attend(*args, **kwargs)),
        ):
            halve_on_out_of_memory(run, min(batch_size, self.work.batch_size or batch_size, len(rows)), self.work)
        if self.on_cuda and self.cache is not None:
            import torch

            if self.cache.bytes > KEPT * torch.cuda.get_device_properties(self.device).total_memory:
                self._forget()  # the training must not lack the memory
        return [replies[at : at + samples] for at in range(0, len(rows), samples)]

    def _sample(self, prompts: Sequence[np.ndarray], draws: np.ndarray) -> list[Reply]:
        order, owners = by_prompt(prompts)
        rows = len(order)
        firsts = order[np.unique(owners, return_index=True)[1]]  # the first reply to each prompt
        prefixes = [prompts[at][:-1] for at in firsts]
        self._reserve(rows, len(prefixes), max(map(len, prefixes)))
        self.cache.begin([len(prefix) for prefix in prefixes], owners)
        self._prefill(prefixes)
        state = self.state
        state.begin([prompts[at] for at in order], draws[order])
        finished: dict[int, Reply] = {}
        live = order.copy()  # of each row that is still decoded, its prompt's index in `prompts`
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
                finished[int(live[at])] = reply
            if len(keep):
                self.cache.move(keep, done)
                state.move(keep)
            live = live[keep]
        return [finished[at] for at in range(rows)]

    def _reserve(self, rows: int, prompts: int, width: int) -> None:
        # Makes room for replies and prompts. Graphs stay valid as long as nothing moves.
        needed = {"prompts": prompts, "rows": rows, "width": width}
        room = {name: max(size, getattr(self.cache, name, 0)) for name, size in needed.items()}
        if all(room[name] == getattr(self.cache, name, 0) for name in room):
            return
        self._forget()
        self.cache = PrefixCache(self.model.config, **room, length=self.length, device=self.device)
        self.state = _State(room["rows"], self.length, self.device)

    def _prefill(self, prefixes: Sequence[np.ndarray]) -> None:
        # All but the last token of each prompt. Prompts of one token get a pass too: it makes the room of each layer.
        lengths = [max(1, len(prefix)) for prefix in prefixes]
        begin = 0
        while begin < len(prefixes):
            end = begin + 1
            while end < len(prefixes) and (end + 1 - begin) * max(lengths[begin : end + 1]) <= PREFILL_TOKENS:
                end += 1
            fill_prompts(self.model, self.cache, begin, prefixes[begin:end], max(lengths[begin:end]))
            begin = end

    def _step(self, rows: int) -> None:
        # Decodes one more token of each of the first `rows` rows.
        state = self.state

        def run() -> None:
            self.cache.begin_step(rows, state.done[0])
            logits = cached_logits(self.model, self.cache, state.ids[:rows], state.positions[:rows])
            state.take(logits, rows, self.temperature, self.end)

        if not self.on_cuda:
            run()
            return
        key = (rows, self.cache.count, self.cache.most)
        if key not in self.graphs:
            self.graphs[key] = self._capture(run)
        self.graphs[key].replay()

    def _capture(self, run: Callable[[], None]) -> Any:
        import torch

        before = [tensor.clone() for tensor in self.state.tensors]
        if self.stream is None:
            # One stream for all graphs: each stream that multiplies matrices holds a workspace for good.
            self.stream = torch.cuda.Stream()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # libraries set up at their first calls; a graph must not hold that
                run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # One pool for all graphs: they run one after the other, and none reads another's memory. The mode lets other
        # threads go on, such as those that pin the memory of batches.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            run()
        for tensor, copied in zip(self.state.tensors, before, strict=True):
            tensor.copy_(copied)
        return graph


class _State:
    # The state of the rows, on the device. All rows have equally many tokens, at most `length`.

    def __init__(self, rows: int, length: int, device: torch.device):
        import torch

        self.ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)  # the token to feed
        self.positions = torch.zeros_like(self.ids)  # of this token
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.draws = torch.zeros((rows, length), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        self.log_probs = torch.zeros((rows, length), dtype=torch.float64, device=device)
        self.done = torch.zeros((1, 1), dtype=torch.int64, device=device)  # tokens of each row
        self.by_row = [self.ids, self.positions, self.alive, self.draws, self.tokens, self.log_probs]
        self.tensors = [*self.by_row, self.done]

    def begin(self, prompts: Sequence[np.ndarray], draws: np.ndarray) -> None:
        # Start with the last token of each prompt.
        import torch

        rows = len(prompts)
        self.ids[:rows, 0] = torch.tensor([int(prompt[-1]) for prompt in prompts])
        self.positions[:rows, 0] = torch.tensor([len(prompt) - 1 for prompt in prompts])
        self.draws[:rows] = torch.from_numpy(draws)
        self.alive[:rows] = True
        self.done.zero_()

    def take(self, logits: torch.Tensor, rows: int, temperature: float, end: int) -> None:
        # Choose the next token of each row from its logits (rows, 1, vocabulary).
        at = self.done.clamp(max=self.draws.shape[1] - 1).expand(rows, 1)
        tokens, log_probs = draw_tokens(logits, self.draws[:rows].gather(1, at)[..., None], temperature)
        self.tokens[:rows].scatter_(1, at, tokens)
        self.log_probs[:rows].scatter_(1, at, log_probs)
        self.ids[:rows] = tokens
        alive = self.alive[:rows]
        alive &= tokens[:, 0] != end
        self.positions[:rows] += alive[:, None]  # a reply that has ended stays where it is
        self.done += 1

    def replies(self, rows: np.ndarray, end: int, done: int) -> list[Reply]:
        # The replies of rows after `done` tokens.
        tokens, log_probs = (each.cpu().numpy()[rows] for each in (self.tokens, self.log_probs))
        replies = []
        for path, values in zip(tokens[:, :done], log_probs[:, :done], strict=True):
            ends = np.flatnonzero(path == end)
            length = ends[0] + 1 if len(ends) else done
            check_numbers(values[:length])
            replies.append(Reply(path[:length].copy(), float(values[:length].sum())))
        return replies

    def move(self, keep: np.ndarray) -> None:
        # Make these rows, int64, the first ones.
        import torch

        rows = torch.from_numpy(keep).to(self.ids.device)
        for tensor in self.by_row:
            tensor[: len(rows)] = tensor[rows]


def by_prompt(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The order of prompts, equal ones together, and each one's number among the different ones; both int64."""
    numbers: dict[bytes, int] = {}
    keys = [np.asarray(prompt, dtype=np.int64).tobytes() for prompt in prompts]
    owners = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    return order, owners[order]


def rows_to_keep(alive: np.ndarray) -> np.ndarray:
    """Indices of the rows to keep, int64, unsorted: the live ones, filled up to a half of all, a quarter, and so on.

    Args:
        alive: whether each row goes on, bool (rows,).

    At least 8 rows stay. Each number of rows needs a graph of its own, so there are few such numbers.
    """
    rows = size = len(alive)
    while size % 2 == 0 and size // 2 >= max(8, alive.sum()):
        size //= 2
    if size == rows:
        return np.arange(rows)
    living, ended = np.flatnonzero(alive), np.flatnonzero(~alive)
    return np.concatenate([living, ended[: size - len(living)]])
