"""Merge an adapter into its base.

The stages call `merge_and_check`, which proves the merge too; `python -m arc.merging` proves a merge that exists.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from arc.decoding.log_probabilities import full_float32
from arc.merging.own_process import merge_in_own_process
from arc.merging.plan import load_merge_base, merge_device, plan_merge
from arc.merging.proof import check_merge
from arc.models.cards import write_model_card
from arc.models.loading import Precision
from arc.models.lora import load_adapter
from arc.models.manifests import absolute_reference, apply_umask, read_manifest
from arc.models.vocabulary import load_tokenizer
from arc.models.weights import saved_dtype


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base and write a standalone 16-bit model.

    The sum is computed in float32 and rounded once. `quantised` merges onto the base as training saw it: its 4-bit
    weights, dequantised. The merge then behaves as the trained model did. `original` merges onto the 16-bit base. For
    an adapter that was trained on a 16-bit base, both are the same.

    Args:
        adapter: a `-lora` folder.
        out: an existing folder, written into.
        base: the 16-bit base folder; default: the one that the adapter names.
        merge_base: "quantised" or "original".
        precision: how the base was loaded in training; default: as the adapter's manifest says.

    Returns:
        `merge_base`, `merged_onto` and `dtype`, for the manifest.

    Raises:
        ValueError: unknown `merge_base`, or an adapter that does not say how its base was loaded.
        FileNotFoundError: the adapter has no safetensors file.
    """
    import torch

    plan = plan_merge(adapter, base, merge_base, precision)
    model = load_merge_base(plan.base, plan.quantised, merge_device())
    # Saved in the base's 16-bit type; in float16 if the training computed in float16.
    float16 = plan.precision is not None and plan.precision.dtype == "float16"
    dtype = torch.float16 if float16 else saved_dtype(plan.base)
    with full_float32():
        merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    if merged.config.tie_word_embeddings:
        merged.tie_weights()
    merged = merged.to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(str(out))
    load_tokenizer(adapter).save_pretrained(str(out))
    onto = "quantised" if plan.quantised else "16-bit"
    done = {"merge_base": merge_base, "merged_onto": onto, "dtype": str(dtype)[6:]}
    write_model_card(out, {**read_manifest(adapter), **done, "base": absolute_reference(plan.base)})
    apply_umask(out)
    return done


def merge_and_check(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
    own_process: bool | None = None,
) -> dict[str, Any]:
    """Merge an adapter and prove the merge.

    Args:
        adapter, out, base, merge_base, precision: see `merge_adapter`.
        own_process: whether to do it in a fresh process. Default: if Unsloth is loaded in this one, because it changes
            the models that the merge and the proof need as they are.

    Returns:
        What `merge_adapter` returns; under "check" what `check_merge` returns.

    Raises:
        MergeError, ValueError, FileNotFoundError: as `merge_adapter` and `check_merge`, from whichever process.
    """
    options: dict[str, Any] = {"base": base, "merge_base": merge_base, "precision": precision}
    if "unsloth" in sys.modules if own_process is None else own_process:
        return merge_in_own_process(adapter, out, **options)
    done = merge_adapter(adapter, out, **options)
    return {**done, "check": check_merge(adapter, out, **options)}
