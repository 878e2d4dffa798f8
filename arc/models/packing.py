"""Rows without padding: several documents one after another in one row, each blind to the others.

A batch of rows of different length is padded to the longest; packed, none of it is wasted. `pack_rows` makes such a
batch in the form that either engine reads, `use_packed_attention` gives a transformers model the attention for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.library_patches import (
    Undo,
    answer_unsloth_lengths,
    choose_attention,
    skip_document_search,
    undo_all,
    wrap_unsloth_attention,
)
from arc.models.prompt_sharing import SharedPrompts, attend_shared, define_operators

if TYPE_CHECKING:
    import torch

ATTENTION = "packed_documents"  # the name under which transformers knows `packed_attention`
IGNORE_INDEX = -100
DOCUMENTS = "packed_documents"  # in a batch for Unsloth: bounds (or SharedPrompts) and longest, see `pack_rows`
LENGTH_STEP = 256  # the longest document's length is given in such steps, so that compiled code seldom sees a new one

_attend_uncompiled: Callable[..., Any] = attend_shared  # what `use_packed_attention` makes of it


def pack_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], engine: str, filler: int = 0, multiple_of: int = 1
) -> dict[str, Any]:
    """One row of several documents.

    A document's first token is not learned: nothing of its own document comes before it. So as many tokens are learned
    as in rows of their own. The last document is filled up, behind all that it can see, where the row's length has to
    be a multiple of something: Unsloth multiplies matrices whose rows are as long as it is, and the fast kernels of a
    GPU for 16 bits want a multiple of 8.

    Args:
        rows: token ids, int64 (tokens,), and which of them are learned, bool (tokens,), of each document.
        engine: "transformers" or "unsloth": what says where documents end.
        filler: the token that the row is filled up with; it is not learned.
        multiple_of: the row's length is rounded up to a multiple of this.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 (1, all tokens), and `use_cache` False; for transformers
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 (documents + 1,), `max_length_q` and `max_length_k`; for Unsloth
        `packed_seq_lengths`, int32 (documents,), and the same as DOCUMENTS, for the hook of `use_packed_attention`.
    """
    import torch

    lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)
    more = -int(lengths.sum()) % multiple_of
    lengths[-1] += more
    ids = np.concatenate([*(ids for ids, _ in rows), np.full(more, filler)])
    learned = np.concatenate([*(learned for _, learned in rows), np.zeros(more, dtype=bool)])
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    learned[bounds[:-1]] = False
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
        "labels": torch.from_numpy(np.where(learned, ids, IGNORE_INDEX).astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
        "use_cache": False,
    }
    longest = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
    ends = torch.from_numpy(bounds)
    if engine == "unsloth":
        return batch | {"packed_seq_lengths": torch.from_numpy(lengths), DOCUMENTS: (ends, longest)}
    return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def check_full_attention(config: Any) -> None:
    """Refuse models that do not see their whole context: attention of our own knows no windows.

    Raises:
        ValueError: such a model.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        raise ValueError(f"{config.model_type} models do not see their whole context: only full attention is supported")


def can_pack(model: Any, dtype: torch.dtype) -> bool:
    """Whether rows without padding are fast for a model where it is: on a GPU that has the kernel, in its 16 bits.

    Args:
        model: any.
        dtype: of its arithmetic.
    """
    import torch

    if not torch.cuda.is_available() or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        check_full_attention(model.config)
    except ValueError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def use_packed_attention(model: Any, engine: str = "transformers") -> Undo:
    """Give a model an attention that separates packed documents; other batches are computed as before.

    Args:
        model: of either engine.
        engine: "transformers" or "unsloth". Unsloth separates documents by itself, but without xformers and flash-attn
            one after the other; here it gets one kernel for all.

    Returns:
        What undoes it.

    Raises:
        ValueError: a model whose attention is not full, or cannot be chosen.
    """
    define_operators()
    check_full_attention(model.config)
    if engine == "unsloth":
        if not any(type(module).forward.__module__.startswith("unsloth.") for module in model.modules()):
            # As on machines without CUDA, where Unsloth leaves the forward pass to transformers.
            raise ValueError(
                "this model's attention is not Unsloth's, and rows cannot be packed: --engine transformers"
            )
        undo = wrap_unsloth_attention(unsloth_attention)
        hook = model.register_forward_pre_hook(_hand_over_documents, with_kwargs=True)
        return undo_all([undo, hook.remove])
    import torch

    global _attend_uncompiled
    _attend_uncompiled = torch.compiler.disable(attend_shared)
    try:
        undo = choose_attention(model, ATTENTION, packed_attention, _packed_mask)
    except ValueError as error:
        raise ValueError(f"{error}: rows cannot be packed") from None
    return undo_all([undo, skip_document_search(model, _is_packed)])


def _is_packed(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("cu_seq_lens_q") is not None or kwargs.get("shared_prompts") is not None


def _packed_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    # A batch without a mask is packed, or its rows have one length; it is causal either way.
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _hand_over_documents(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # `unsloth_attention` finds the documents at the tensor of the lengths. Unsloth's own table of answers may hold a
    # later batch's where activations are recomputed.
    documents = kwargs.pop(DOCUMENTS, None)
    if documents is not None:
        lengths = kwargs["packed_seq_lengths"]
        lengths.documents = documents
        answer_unsloth_lengths(lengths, *documents)
    return args, kwargs


def unsloth_attention(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Unsloth's attention, with one kernel for all documents of a packed row where PyTorch's can be used.

    Args:
        plain: Unsloth's `run_attention`, for all else.

    Returns:
        What takes its place: of `config`, `context`, and `Q`, `K` and `V` (rows, heads, tokens, size), which gives
        (rows, tokens, heads, size).
    """
    if getattr(plain, "knows_documents", False):
        return plain

    def attention(*, config: Any, context: Any, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:  # noqa: N803
        bounds, longest = getattr(context.seq_info[0], "documents", (None, None)) if context.seq_info else (None, None)
        if isinstance(bounds, SharedPrompts):
            return attend_shared(Q, K, V, bounds, kernel=has_document_kernel(Q))
        if (
            bounds is None
            or context.prefix_seg_info is not None
            or context.attention_mask is not None
            or context.sliding_window is not None
            or not context.is_causal
            or not has_document_kernel(Q)
            or Q.shape[0] != 1
            or Q.shape[2] != K.shape[2]
        ):
            return plain(config=config, context=context, Q=Q, K=K, V=V)
        return attend_documents(Q, K, V, bounds, longest)

    vars(attention)["knows_documents"] = True
    return attention


def has_document_kernel(query: torch.Tensor) -> bool:
    """Whether PyTorch's flash attention takes a query, of a GPU that has it."""
    import torch

    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[-1] > 256 or query.shape[-1] % 8:  # scaled_dot_product_attention would pad it
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    scaling: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention within each document of one row, in one kernel on a GPU that has it.

    Args:
        query: (1, query heads, tokens, size).
        key, value: (1, heads, tokens, size).
        bounds: where documents begin, and the end, int32 (documents + 1,).
        longest: tokens of the longest document, or more.
        scaling: of the scores; default: 1 / sqrt(size).

    Returns:
        (1, tokens, query heads, size).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if has_document_kernel(query):
        # The kernel that scaled_dot_product_attention takes too; by its own name it is told where documents end.
        found = torch.ops.aten._flash_attention_forward(
            query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), bounds, bounds, longest,
            longest, 0.0, True, False, scale=scaling,
        )[0]  # fmt: skip
        return found[None]
    parts = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        document = (slice(None), slice(None), slice(begin, end))
        parts.append(
            scaled_dot_product_attention(
                query[document], key[document], value[document], is_causal=True, scale=scaling,
                enable_gqa=query.shape[1] > key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: within documents where their bounds are given, else causal or as masked.

    Args:
        module: the layer.
        query: (rows, query heads, tokens, size).
        key, value: (rows, heads, tokens, size).
        attention_mask: of transformers, or None.
        dropout: not supported, as in no Llama.
        scaling: of the scores.
        cu_seq_lens_q: bounds of the documents, int32 (documents + 1,); None: each row is one.
        max_length_q: of the longest document, or more.
        shared_prompts: where the parts of a row of prompt_sharing are.

    Returns:
        (rows, tokens, query heads, size), and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if shared_prompts is not None:
        if has_document_kernel(query):
            return attend_shared(query, key, value, shared_prompts, scaling, kernel=True), None
        # Compiled layers leave it out: each row divides its tokens otherwise.
        return _attend_uncompiled(query, key, value, shared_prompts, scaling, kernel=False), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return attend_documents(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
