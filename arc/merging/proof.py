"""The proof of a merge, from the files on the disk.

Three things are checked:

- `proof_weights.check_weights`: every weight is base + adapter, rounded once;
- `proof_behaviour.check_behaviour`: the model that plain transformers loads answers as base + adapter does;
- `check_vocabulary`: the tokenizer is the adapter's.

How near the merge comes to the model as it was trained is reported too, from the probe that was recorded when the
training ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arc.merging.plan import load_merge_base, merge_device, plan_merge
from arc.merging.probe import make_probe_rows, plan_probe, read_probe
from arc.merging.proof_behaviour import check_behaviour
from arc.merging.proof_weights import check_weights
from arc.models.loading import Precision
from arc.models.vocabulary import KEPT_CHARACTERS, load_tokenizer
from arc.models.weights import MergeError
from arc.runs.needs import format_duration


def check_merge(
    adapter: str | Path,
    merged: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Prove that a merged model, as it is on the disk, is the sum of merge base and adapter.

    Args:
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        base, merge_base, precision: see `merge.merge_adapter`.

    Returns:
        What `check_weights` and `check_behaviour` return, and `seconds`; numbers and text only, for the manifest.

    Raises:
        MergeError: it is not; the message says what differs.
        ValueError, FileNotFoundError: as `merge.merge_adapter`.
    """
    begin = time.perf_counter()
    plan = plan_merge(adapter, base, merge_base, precision)
    probe = read_probe(adapter)
    tokenizer = load_tokenizer(adapter)
    rows = probe.rows if probe else [row["input_ids"] for row in make_probe_rows(tokenizer)]
    check_vocabulary(adapter, merged, rows)
    model = load_merge_base(plan.base, plan.quantised, merge_device())
    weights = check_weights(model, adapter, merged)
    probe = probe or plan_probe(make_probe_rows(tokenizer), model, model.config.vocab_size)
    behaviour = check_behaviour(model, adapter, merged, probe)
    return {**behaviour, **weights, "seconds": round(time.perf_counter() - begin, 1)}


def describe_check(result: dict[str, Any]) -> str:
    """The result of `check_merge` as one line for a log."""
    line = (
        f"merge proven in {format_duration(result['seconds'])}: all {result['weights']:,} weights are base + adapter "
        f"rounded once; reloaded, it answers {result['prompts']} prompts within {result['kl']:.1e} nats a token of "
        f"base + adapter (rounding: {result['kl_rounding']:.1e}, the adapter changes {result['adapter_kl']:.1e}), "
        f"first choice the same at {result['top1']:.2%} of {result['positions']:,} positions"
    )
    if result["trained_kl"] is not None:
        line += f"; to the model as trained: {result['trained_kl']:.1e} nats, first choice {result['trained_top1']:.2%}"
    if result["trained_greedy"] is not None:
        line += f", greedy replies {result['trained_greedy']:.0%} the same"
    return line


def check_vocabulary(adapter: str | Path, merged: str | Path, rows: Sequence[np.ndarray]) -> None:
    """Prove that the tokenizer saved with a merge is the adapter's.

    Args:
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        rows: token ids, (tokens,) each. Both tokenizers have to encode their texts alike.

    Raises:
        MergeError: they differ in size, in a token, in special tokens, or in how they encode a text.
    """
    ours, theirs = load_tokenizer(adapter), load_tokenizer(merged)
    if len(ours) != len(theirs):
        raise MergeError(f"the tokenizer of {merged} has {len(theirs):,} tokens, the adapter's {len(ours):,}")
    merged_ids = theirs.get_vocab()
    for token, number in ours.get_vocab().items():
        if merged_ids.get(token) != number:
            raise MergeError(
                f"token {token!r} is {merged_ids.get(token)} in the tokenizer of {merged}, {number} in the adapter's"
            )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_ids"):
        expected, got = getattr(ours, name), getattr(theirs, name)
        if expected != got:
            raise MergeError(f"{name} of the tokenizer of {merged} is {got}, of the adapter's {expected}")
    for text in [KEPT_CHARACTERS, *(ours.decode(row, skip_special_tokens=False) for row in rows)]:
        expected, got = ours(text)["input_ids"], theirs(text)["input_ids"]
        if expected != got:
            at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), len(expected))
            raise MergeError(
                f"the tokenizer of {merged} encodes {text[:20]!r}... otherwise than the adapter's, from token {at} on"
            )
