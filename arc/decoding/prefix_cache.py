"""Keys and values of many replies to few prompts: each prompt's stand there once, and each reply's own apart from them.

A step of decoding has to read what it attends to. Of a group of replies that is mostly their prompt, the same for all
of them, so it is read once for the group: all its queries attend to the prompt as if they were tokens of one row, then
each reply's to its own tokens, and softmax over both is the mean of the two, weighted by their sums of exponentials
("Hydragen: High-Throughput LLM Inference with Shared Prefixes", Juravsky et al. 2024, arXiv:2402.05099).

Everything has a fixed place, so that a CUDA graph of a step stays valid while prompts and replies change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.rows import round_up
from arc.models.packing import has_document_kernel

if TYPE_CHECKING:
    import torch

WIDTH_STEP = 256  # columns by which the room for prompts is measured
SPARE = 2  # columns of a reply beyond the longest: a graph is tried twice before it is captured


class PrefixCache:
    """The part of transformers' Cache that attention layers call, `update`, and the attention that goes with it.

    Args:
        config: of the model.
        prompts: most prompts at once.
        rows: most replies at once.
        width: tokens of the longest prompt.
        length: tokens of the longest reply.
        device: where.

    Attributes:
        prompts, rows, width, length: room that there is.
        groups: query heads that share keys.
        most: replies of the prompt that has most, or some more: graphs depend on it.
        layers: of each layer the prompts' keys and values (prompts, width, heads, size of a head), then the replies'
            (rows, length, heads, size); made when a prompt first goes through the layer.
    """

    is_compileable = False

    def __init__(self, config: Any, *, prompts: int, rows: int, width: int, length: int, device: torch.device):
        """See the class."""
        import torch

        self.prompts, self.rows = prompts, rows
        self.width, self.length = round_up(max(width, 1), WIDTH_STEP), round_up(length + SPARE, 16)
        heads = config.num_attention_heads
        self.groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        self.layers: list[list[torch.Tensor]] = []
        self.most = 0
        self._is_prompt = False
        self._step_mask: torch.Tensor | None = None
        whole = {"dtype": torch.int32, "device": device}
        # Of all prompts: tokens, and where the queries of its replies begin and end; of all rows: their prompts.
        self._prompt_lengths = torch.zeros(prompts, **whole)
        self._query_bounds = torch.zeros(prompts + 1, **whole)
        self._owners = torch.zeros(rows, dtype=torch.int64, device=device)
        self._has_prompt = torch.zeros(rows * self.groups, dtype=torch.float32, device=device)
        self._own_lengths = torch.zeros(rows, **whole)
        self._prompt_columns = torch.arange(prompts + 1, **whole) * self.width
        self._row_queries = torch.arange(rows + 1, **whole) * self.groups
        self._row_columns = torch.arange(rows + 1, **whole) * self.length

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(part.numel() * part.element_size() for layer in self.layers for part in layer)

    def begin(self, lengths: Sequence[int], owners: np.ndarray) -> None:
        """New prompts, and the replies to them.

        Args:
            lengths: tokens of each prompt that will be in the cache, 0 for one that has none.
            owners: the number of each reply's prompt, int64 (replies,), ascending.
        """
        import torch

        self._lengths = np.asarray(lengths)
        self.count = len(self._lengths)  # of prompts
        self._prompt_lengths[: self.count] = torch.from_numpy(self._lengths.astype(np.int32))
        self._keep(owners)

    def _keep(self, owners: np.ndarray) -> None:
        import torch

        self._numbers = owners
        counts = np.bincount(owners, minlength=self.count)
        bounds = self.groups * np.concatenate([[0], np.cumsum(counts)])
        self._query_bounds[: self.count + 1] = torch.from_numpy(bounds.astype(np.int32))
        self._owners[: len(owners)] = torch.from_numpy(owners)
        filled = np.repeat(self._lengths[owners] > 0, self.groups).astype(np.float32)
        self._has_prompt[: len(filled)] = torch.from_numpy(filled)
        self.most = round_up(int(counts.max()), 8)

    def move(self, keep: np.ndarray, tokens: int) -> None:
        """Go on with some of the replies.

        Args:
            keep: their rows, int64, ascending.
            tokens: of each reply, so far.
        """
        import torch

        rows = torch.from_numpy(keep).to(self._owners.device)
        for _, _, keys, values in self.layers:
            for stored in (keys, values):
                stored[: len(keep), :tokens] = stored[rows, :tokens]
        self._keep(self._numbers[keep])

    def begin_prompts(self, first: int, width: int) -> None:
        """The next pass fills prompts from `first` on from column 0, and sees nothing else."""
        self._is_prompt, self._first, self._prefill = True, first, width

    def begin_step(self, rows: int, column: torch.Tensor) -> None:
        """The next pass writes into a column of the first rows, and sees their prompts and what they have so far.

        Args:
            rows: how many.
            column: the same for all, int64 (1,).
        """
        self._is_prompt, self._step_rows, self._column = False, rows, column
        self._own_lengths[:rows] = column + 1
        self._step_mask = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what one layer computed, (rows, heads, fed, size of a head); returned as it is, see `attend`."""
        layer = self._layer(layer_idx, keys, values)
        for at, new in enumerate((keys, values)):
            if self._is_prompt:
                layer[at][self._first : self._first + len(new), : self._prefill] = new.transpose(1, 2)
            else:
                layer[2 + at][: len(new)].index_copy_(1, self._column, new.transpose(1, 2))
        return keys, values

    def _layer(self, number: int, *new: torch.Tensor) -> list[torch.Tensor]:
        while len(self.layers) <= number:  # zeros, since a mask does not hide what is not a number
            prompts = [t.new_zeros((self.prompts, self.width, t.shape[1], t.shape[3])) for t in new]
            replies = [t.new_zeros((self.rows, self.length, t.shape[1], t.shape[3])) for t in new]
            self.layers.append([*prompts, *replies])
        return self.layers[number]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Room for prompts: models that ask for it are given positions, and do without it."""
        return self.width

    # -- attention

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
        dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention of transformers' kind for the pass that was begun.

        Args:
            module: the layer; its `layer_idx` says which.
            query: (rows, query heads, fed, size).
            key, value: what `update` was given.
            attention_mask, dropout, kwargs: not needed.
            scaling: of the products.

        Returns:
            (rows, fed, query heads, size), and no weights.
        """
        from torch.nn.functional import scaled_dot_product_attention

        if self._is_prompt:
            options = {"is_causal": True, "scale": scaling, "enable_gqa": self.groups > 1}
            return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).contiguous(), None
        layer = self.layers[module.layer_idx]
        if has_document_kernel(query):
            attend = self._attend_with_kernel
        else:  # a graph cannot go from prompt to prompt, whose rows change
            attend = self._attend_with_mask if query.is_cuda else self._attend_by_prompt
        return attend(query, layer, scaling), None

    def _attend_with_kernel(
        self, query: torch.Tensor, layer: list[torch.Tensor], scaling: float | None
    ) -> torch.Tensor:
        import torch

        rows, heads, _, size = query.shape
        shared = heads // self.groups
        # Query heads that share keys become further queries of one head.
        queries = query.view(rows, shared, self.groups, size).transpose(1, 2).reshape(rows * self.groups, shared, size)

        def flash(keys: Any, values: Any, bounds: Any, columns: Any, most: int, width: int, used: Any) -> Any:
            return torch.ops.aten._flash_attention_forward(
                queries, keys.view(-1, shared, size), values.view(-1, shared, size), bounds, columns, most, width, 0.0,
                False, False, scale=scaling, seqused_k=used,
            )[:2]  # fmt: skip

        to_prompt, prompt_sum = flash(
            layer[0][: self.count], layer[1][: self.count], self._query_bounds[: self.count + 1],
            self._prompt_columns[: self.count + 1], self.most * self.groups, self.width,
            self._prompt_lengths[: self.count],
        )  # fmt: skip
        to_own, own_sum = flash(
            layer[2][:rows], layer[3][:rows], self._row_queries[: rows + 1], self._row_columns[: rows + 1],
            self.groups, self.length, self._own_lengths[:rows],
        )  # fmt: skip
        share = torch.sigmoid(prompt_sum - own_sum) * self._has_prompt[: rows * self.groups]
        found = torch.lerp(to_own, to_prompt, share.to(to_own.dtype).t()[..., None])
        return found.view(rows, self.groups, shared, size).transpose(1, 2).reshape(rows, 1, heads, size)

    def _attend_by_prompt(self, query: torch.Tensor, layer: list[torch.Tensor], scaling: float | None) -> torch.Tensor:
        import torch

        rows, heads, _, size = query.shape
        shared, length = heads // self.groups, int(self._column) + 1
        scale = scaling or size**-0.5
        queries = query.view(rows, shared, self.groups, size)
        own_keys, own_values = (stored[:rows, :length].transpose(1, 2) for stored in layer[2:])
        own_scores = queries @ own_keys.transpose(-1, -2)  # (rows, heads, queries, seen)
        found = torch.empty_like(queries)
        bounds = np.searchsorted(self._numbers[:rows], np.arange(self.count + 1))
        for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if begin == end:
                continue
            width, part = int(self._lengths[number]), slice(begin, end)
            keys, values = (stored[number, :width].transpose(0, 1) for stored in layer[:2])  # (heads, width, size)
            count = end - begin
            folded = queries[part].transpose(0, 1).reshape(shared, count * self.groups, size)
            scores = (folded @ keys.transpose(-1, -2)).view(shared, count, self.groups, width).transpose(0, 1)
            weights = (torch.cat([scores, own_scores[part]], dim=-1).float() * scale).softmax(-1).to(query.dtype)
            to_prompt = weights[..., :width].transpose(0, 1).reshape(shared, count * self.groups, width) @ values
            to_prompt = to_prompt.view(shared, count, self.groups, size).transpose(0, 1)
            found[part] = to_prompt + weights[..., width:] @ own_values[part]
        return found.reshape(rows, 1, heads, size)

    def _attend_with_mask(self, query: torch.Tensor, layer: list[torch.Tensor], scaling: float | None) -> torch.Tensor:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        rows, heads, _, size = query.shape
        width, length = self.width, self.length  # a graph sees all the room
        owners = self._owners[:rows]
        if self._step_mask is None:  # one for all layers
            prompts = torch.arange(width, device=query.device) < self._prompt_lengths[owners][:, None]
            own = torch.arange(length, device=query.device) < self._own_lengths[:rows, None]
            self._step_mask = torch.cat([prompts, own], dim=1)[:, None, None]
        keys, values = (
            torch.cat([layer[at][owners, :width], layer[2 + at][:rows, :length]], dim=1).transpose(1, 2)
            for at in (0, 1)
        )
        folded = query.reshape(rows, heads // self.groups, self.groups, size)
        found = scaled_dot_product_attention(folded, keys, values, attn_mask=self._step_mask, scale=scaling)
        return found.reshape(rows, 1, heads, size)
