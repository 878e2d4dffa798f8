"""A cache for many replies to few prompts: it holds each prompt once, and the tokens of each reply apart.

A step of decoding reads the keys and values that it attends to. Here a step reads the prompt of a group once: all
queries of the group attend to it as tokens of one row. Each query then attends to its reply. Softmax over both is the
mean of the two results, weighted by their sums of exponentials.

Everything has a fixed place in memory, so that the CUDA graph of a step stays valid while prompts and replies change.

Source: "Hydragen: High-Throughput LLM Inference with Shared Prefixes", Juravsky et al. 2024, arXiv:2402.05099.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.packing import has_document_kernel
from arc.models.prompt_sharing import round_up

if TYPE_CHECKING:
    import torch

WIDTH_STEP = 256  # the room for prompts is a multiple of so many columns
SPARE = 2  # columns beyond the longest reply: two trial passes come before the capture of a graph


class PrefixCache:
    """The method of transformers' Cache that attention layers call, `update`, and the attention that goes with it.

    Args:
        config: of the model.
        prompts, rows: most prompts and replies at once.
        width, length: tokens of the longest prompt and reply.

    Attributes:
        groups: query heads that share keys.
        most: most replies to one prompt, rounded up: graphs depend on it.
        layers: of each layer the prompts' keys and values (prompts, width, heads, size of a head), then the replies'
            (rows, length, heads, size); made at the first pass of a prompt.
    """

    is_compileable = False

    def __init__(self, config: Any, *, prompts: int, rows: int, width: int, length: int, device: torch.device):
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
        # Per prompt: its tokens, and where the queries of its replies begin and end. Per row: its prompt.
        self._prompt_lengths = torch.zeros(prompts, **whole)
        self._query_bounds = torch.zeros(prompts + 1, **whole)
        self._owners = torch.zeros(rows, dtype=torch.int64, device=device)
        self._has_prompt = torch.zeros(rows * self.groups, dtype=torch.float32, device=device)
        self._reply_lengths = torch.zeros(rows, **whole)
        self._prompt_columns = torch.arange(prompts + 1, **whole) * self.width
        self._row_queries = torch.arange(rows + 1, **whole) * self.groups
        self._row_columns = torch.arange(rows + 1, **whole) * self.length

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer)

    def begin(self, lengths: Sequence[int], owners: np.ndarray) -> None:
        """Start with new prompts of so many tokens, and replies; `owners` is each reply's prompt, int64, ascending."""
        import torch

        self._lengths = np.asarray(lengths)
        self.count = len(self._lengths)  # of prompts
        self._prompt_lengths[: self.count] = torch.from_numpy(self._lengths.astype(np.int32))
        self._set_owners(owners)

    def _set_owners(self, owners: np.ndarray) -> None:
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
        """Continue with these rows, int64, ascending, which have so many tokens."""
        import torch

        rows = torch.from_numpy(keep).to(self._owners.device)
        for _, _, keys, values in self.layers:
            for stored in (keys, values):
                stored[: len(keep), :tokens] = stored[rows, :tokens]
        self._set_owners(self._numbers[keep])

    def begin_prompts(self, first: int, width: int) -> None:
        """The next pass fills the prompts from `first` on, from column 0, and attends to nothing else."""
        self._is_prompt, self._first, self._prefill = True, first, width

    def begin_step(self, rows: int, column: torch.Tensor) -> None:
        """The next pass writes this column, int64 (1,), of the first rows; it attends to their prompts and tokens."""
        self._is_prompt, self._column = False, column
        self._reply_lengths[:rows] = column + 1
        self._step_mask = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values, (rows, heads, fed, size of a head); returns them, see `attend`."""
        layer = self._layer(layer_idx, keys, values)
        for at, new in enumerate((keys, values)):
            if self._is_prompt:
                layer[at][self._first : self._first + len(new), : self._prefill] = new.transpose(1, 2)
            else:
                layer[2 + at][: len(new)].index_copy_(1, self._column, new.transpose(1, 2))
        return keys, values

    def _layer(self, number: int, *new: torch.Tensor) -> list[torch.Tensor]:
        while len(self.layers) <= number:  # zeros, since a mask does not hide NaN
            prompts = [t.new_zeros((self.prompts, self.width, t.shape[1], t.shape[3])) for t in new]
            replies = [t.new_zeros((self.rows, self.length, t.shape[1], t.shape[3])) for t in new]
            self.layers.append([*prompts, *replies])
        return self.layers[number]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Room for prompts; models may ask, but use the positions that they are called with."""
        return self.width

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
        dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention of transformers' interface, for the pass that was begun, of queries (rows, query heads, fed, size).

        Returns:
            (rows, fed, query heads, size), and None for the weights.
        """
        from torch.nn.functional import scaled_dot_product_attention

        if self._is_prompt:
            options = {"is_causal": True, "scale": scaling, "enable_gqa": self.groups > 1}
            return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).contiguous(), None
        layer = self.layers[module.layer_idx]
        if has_document_kernel(query):
            attend = self._attend_with_kernel
        else:  # a graph cannot loop over prompts, whose rows change
            attend = self._attend_with_mask if query.is_cuda else self._attend_by_prompt
        return attend(query, layer, scaling), None

    def _attend_with_kernel(self, query: torch.Tensor, layer: list[torch.Tensor], scaling: float | None) -> Any:
        import torch

        rows, heads, _, size = query.shape
        shared = heads // self.groups
        # Query heads that share keys become more queries of one head.
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
        to_reply, reply_sum = flash(
            layer[2][:rows], layer[3][:rows], self._row_queries[: rows + 1], self._row_columns[: rows + 1],
            self.groups, self.length, self._reply_lengths[:rows],
        )  # fmt: skip
        share = torch.sigmoid(prompt_sum - reply_sum) * self._has_prompt[: rows * self.groups]
        mixed = torch.lerp(to_reply, to_prompt, share.to(to_reply.dtype).t()[..., None])
        return mixed.view(rows, self.groups, shared, size).transpose(1, 2).reshape(rows, 1, heads, size)

    def _attend_by_prompt(self, query: torch.Tensor, layer: list[torch.Tensor], scaling: float | None) -> torch.Tensor:
        import torch

        rows, heads, _, size = query.shape
        shared, length = heads // self.groups, int(self._column) + 1
        scale = scaling or size**-0.5
        queries = query.view(rows, shared, self.groups, size)
        reply_keys, reply_values = (stored[:rows, :length].transpose(1, 2) for stored in layer[2:])
        reply_scores = queries @ reply_keys.transpose(-1, -2)  # (rows, heads, queries, seen)
        out = torch.empty_like(queries)
        bounds = np.searchsorted(self._numbers[:rows], np.arange(self.count + 1))
        for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if begin == end:
                continue
            width, group = int(self._lengths[number]), slice(begin, end)
            keys, values = (stored[number, :width].transpose(0, 1) for stored in layer[:2])  # (heads, width, size)
            count = end - begin
            folded = queries[group].transpose(0, 1).reshape(shared, count * self.groups, size)
            scores = (folded @ keys.transpose(-1, -2)).view(shared, count, self.groups, width).transpose(0, 1)
            weights = (torch.cat([scores, reply_scores[group]], dim=-1).float() * scale).softmax(-1).to(query.dtype)
            to_prompt = weights[..., :width].transpose(0, 1).reshape(shared, count * self.groups, width) @ values
            to_prompt = to_prompt.view(shared, count, self.groups, size).transpose(0, 1)
            out[group] = to_prompt + weights[..., width:] @ reply_values[group]
        return out.reshape(rows, 1, heads, size)

    def _attend_with_mask(self, query: torch.Tensor, layer: list[torch.Tensor], scaling: float | None) -> torch.Tensor:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        rows, heads, _, size = query.shape
        width, length = self.width, self.length  # a graph reads the whole room
        owners = self._owners[:rows]
        if self._step_mask is None:  # one for all layers
            prompts = torch.arange(width, device=query.device) < self._prompt_lengths[owners][:, None]
            replies = torch.arange(length, device=query.device) < self._reply_lengths[:rows, None]
            self._step_mask = torch.cat([prompts, replies], dim=1)[:, None, None]
        keys, values = (
            torch.cat([layer[at][owners, :width], layer[2 + at][:rows, :length]], dim=1).transpose(1, 2)
            for at in (0, 1)
        )
        folded = query.reshape(rows, heads // self.groups, self.groups, size)
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=self._step_mask, scale=scaling)
        return out.reshape(rows, 1, heads, size)
