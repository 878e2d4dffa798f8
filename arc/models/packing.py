"""Packed rows: several documents one after another in one row without padding, each blind to the others.

`pack_rows` makes such a batch for either engine, `use_packed_attention` gives a model the attention for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models import library_patches
from arc.models.prompt_sharing import LENGTH_STEP, SharedPrompts, attend_shared, define_operators, round_up

if TYPE_CHECKING:
    import torch

ATTENTION = "packed_documents"  # the name under which transformers knows `packed_attention`
IGNORE_INDEX = -100
DOCUMENTS = "packed_documents"  # in a batch for Unsloth: bounds (or SharedPrompts) and longest, see `pack_rows`

_attend_uncompiled: Callable[..., Any] = attend_shared  # `use_packed_attention` takes it out of compiled layers


def pack_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], engine: str, filler: int = 0, multiple_of: int = 1
) -> dict[str, Any]:
    """One row of several documents.

    A document's first token is not learned, as in separate rows: no token of its document comes before it.
    (transformers' DataCollatorWithFlattening neither pads nor rounds lengths, and does not know Unsloth's form.)

    Args:
        rows: token ids, int64 (tokens,), and which of them are learned, bool (tokens,), of each document.
        engine: "transformers" or "unsloth", which read the borders of documents in different forms.
        filler: the padding token; it is not learned.
        multiple_of: the last document is padded, so that the row has a multiple of so many tokens. The fast 16-bit
            kernels of a GPU need a multiple of 8.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 (1, all tokens), and `use_cache` False; for transformers
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32 (documents + 1,), `max_length_q` and `max_length_k`; for Unsloth
        `packed_seq_lengths`, int32 (documents,), and DOCUMENTS, for the hook of `use_packed_attention`.
    """
    import torch

    lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)
    padding = -int(lengths.sum()) % multiple_of
    lengths[-1] += padding
    ids = np.concatenate([*(ids for ids, _ in rows), np.full(padding, filler)])
    learned = np.concatenate([*(learned for _, learned in rows), np.zeros(padding, dtype=bool)])
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    learned[bounds[:-1]] = False
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
        "labels": torch.from_numpy(np.where(learned, ids, IGNORE_INDEX).astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
        "use_cache": False,
    }
    longest = round_up(int(lengths.max()), LENGTH_STEP)
    ends = torch.from_numpy(bounds)
    if engine == "unsloth":
        return batch | {"packed_seq_lengths": torch.from_numpy(lengths), DOCUMENTS: (ends, longest)}
    return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def check_full_attention(config: Any) -> None:
    """Raise ValueError for a model whose attention has a window, which the attention functions here do not have."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        raise ValueError(f"{config.model_type} models do not see their whole context: only full attention is supported")


def can_pack(model: Any, dtype: torch.dtype) -> bool:
    """Whether this device has a fast kernel for packed rows of a model; `dtype` is the type of its arithmetic."""
    import torch

    if not torch.cuda.is_available() or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        check_full_attention(model.config)
    except ValueError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def use_packed_attention(model: Any, engine: str = "transformers") -> library_patches.Undo:
    """Give a model an attention that separates packed documents; other batches are computed as before.

    Args:
        engine: "transformers" or "unsloth". Unsloth separates documents by itself, but without xformers and flash-attn
            one after the other; here it gets one kernel for all.

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
        undo = library_patches.wrap_unsloth_attention(unsloth_attention)
        hook = model.register_forward_pre_hook(_hand_over_documents, with_kwargs=True)
        return library_patches.undo_all([undo, hook.remove])
    import torch

    global _attend_uncompiled
    _attend_uncompiled = torch.compiler.disable(attend_shared)
    try:
        undo = library_patches.choose_attention(model, ATTENTION, packed_attention, _packed_mask)
    except ValueError as error:
        raise ValueError(f"{error}: rows cannot be packed") from None
    return library_patches.undo_all([undo, library_patches.skip_document_search(model, _is_packed)])


def _is_packed(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("cu_seq_lens_q") is not None or kwargs.get("shared_prompts") is not None


def _packed_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    # A batch without a mask is packed, or its rows have one length; it is causal either way.
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _hand_over_documents(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # `unsloth_attention` reads the documents from the tensor of the lengths. Where activations are recomputed,
    # Unsloth's table may hold those of a later batch.
    documents = kwargs.pop(DOCUMENTS, None)
    if documents is not None:
        lengths = kwargs["packed_seq_lengths"]
        lengths.documents = documents
        library_patches.answer_unsloth_lengths(lengths, *documents)
    return args, kwargs


def unsloth_attention(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Unsloth's `run_attention`, with PyTorch's kernel for all documents of a packed row at once where it can be used.

    Returns:
        A function of `config`, `context`, `Q`, `K` and `V` (rows, heads, tokens, size), which gives (rows, tokens,
        heads, size).
    """
    if getattr(plain, "knows_documents", False):
        return plain

    def attention(*, config: Any, context: Any, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:  # noqa: N803
        documents: Any = getattr(context.seq_info[0], "documents", None) if context.seq_info else None
        bounds, longest = documents or (None, 0)
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
    """Whether PyTorch's flash attention takes this query, and its GPU has the kernel."""
    import torch

    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[-1] > 256 or query.shape[-1] % 8:  # scaled_dot_product_attention would pad the heads
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
        scaling: factor of the scores; default: 1 / sqrt(size).

    Returns:
        (1, tokens, query heads, size).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if has_document_kernel(query):
        # The kernel of scaled_dot_product_attention, with the borders of documents. Not torch.nn.attention.varlen: with
        # grouped heads 2.12 needs its argument enable_gqa, which 2.11 does not have.
        out = torch.ops.aten._flash_attention_forward(
            query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), bounds, bounds, longest,
            longest, 0.0, True, False, scale=scaling,
        )[0]  # fmt: skip
        return out[None]
    results = []
    options = {"is_causal": True, "scale": scaling, "enable_gqa": query.shape[1] > key.shape[1]}
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
        results.append(scaled_dot_product_attention(q, k, v, **options))
    return torch.cat(results, dim=2).transpose(1, 2).contiguous()


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0, shared_prompts: SharedPrompts | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of transformers' interface: within documents where their bounds are given, else causal or as masked.

    Args:
        query: (rows, query heads, tokens, size).
        key, value: (rows, heads, tokens, size).
        dropout: only without documents; no Llama has it.
        cu_seq_lens_q, max_length_q: bounds and longest of `attend_documents`; None: each row is one document.
        shared_prompts: segments of a row of prompt_sharing.

    Returns:
        (rows, tokens, query heads, size), and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if shared_prompts is not None:
        if has_document_kernel(query):
            return attend_shared(query, key, value, shared_prompts, scaling, kernel=True), None
        # Not compiled: each row has other segments.
        return _attend_uncompiled(query, key, value, shared_prompts, scaling, kernel=False), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return attend_documents(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
