"""The proof of a merge: its weights, its behaviour and its tokenizer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.log_probabilities import log_probabilities_of_rows
from arc.merging.plan import load_merge_base, merge_device, plan_merge
from arc.merging.probe import (
    Probe,
    affordable_probe_rows,
    make_probe_rows,
    plan_probe,
    probe_answers,
    read_probe,
)
from arc.models.loading import Precision
from arc.models.lora import load_adapter
from arc.models.vocabulary import KEPT_CHARACTERS, load_tokenizer
from arc.models.weights import AdapterSum, MergeError, row_blocks, state_without_ties
from arc.runs.needs import format_duration

if TYPE_CHECKING:
    import torch


# The bound of a merge's distance from base + adapter, as a multiple of the distance that rounding the weights causes.
# A merge rounds each weight once. Errors d of the weights change the answers by KL = 1/2 d'Fd to second order (F: the
# Fisher information). F is not known, so the effect is measured on the model itself: the sum is made again from the
# files, rounded, and asked. A right merge differs from it only in weights so near the middle between two numbers that
# the order of a sum in float32 decides. On 200 tiny trained models (tied and not, 4 and 16 bits, bfloat16 and float16
# stored, learning rates 1e-5 to 1e-2) the merge's KL was 0.74 to 1.10 times that of the rounding. The extremes are
# float16's, where 0.05% of the weights are so decided. A factor of 4 allows twice the distance in the answers.
# Independent random errors would be no yardstick: on 36 of the models their KL was 0.3 to 16 times the merge's. Where
# an adapter's changes are below half an ulp, rounding takes them back. Such errors all point against what was learned.
# A right merge has them too; that they are large shows in `kl` beside `adapter_kl`.
KL_FACTOR = 4.0
KL_FLOOR = 1e-9  # nats a token: how far two orders of summation in float32 may be apart (below 1e-12 on those models)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    # KL(p || q) in nats a token of log probabilities (rows, positions, vocabulary).
    p, q = p.double(), q.double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def _same_choice(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of `dtype`'s numbers at x: the largest error of rounding x to it; subnormals included."""
    import torch

    numbers = torch.finfo(dtype)
    _, exponent = torch.frexp(x)
    # frexp gives x = m * 2**exponent with m in [0.5, 1), so that x's binade begins at 2**(exponent - 1); 0 as 0 * 2**0.
    lowest = round(math.log2(numbers.smallest_normal))
    binade = torch.where(x == 0, lowest, exponent - 1).clamp(min=lowest)
    return torch.ldexp(torch.full_like(x, numbers.eps / 2), binade)


class _Stored:
    """The tensors of a model folder, read from disk as they are asked for."""

    def __init__(self, folder: str | Path):
        """See the class.

        Raises:
            MergeError: there are no safetensors, or a file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self._file_of: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(str(self.folder / name), "pt")
                self._file_of |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                raise MergeError(f"{self.folder / name} cannot be read ({error})") from None

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def slice(self, name: str) -> Any:
        """A tensor whose rows are read when it is indexed."""
        return self._file_of[name].get_slice(name)


def check_weights(model: Any, adapter: str | Path, merged: str | Path) -> dict[str, Any]:
    """Prove that every weight of a merged model is base + adapter, rounded once.

    The sum is computed again in float64, from the adapter's files. A stored weight may differ from it by half an ulp of
    the stored type, and by the error of a sum in float32.

    Args:
        model: the merge base, as `load_merge_base` gives it.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.

    Returns:
        `weights`, their number; `largest_weight_error` in half ulps of the stored type, less the error of a sum in
        float32 (so at most 1); `largest_weight_error_in`, the tensor.

    Raises:
        MergeError: a tensor is missing, left over, of another shape or type, or off; the worst is named.
    """
    import torch
    from transformers import AutoConfig

    stored, expected = _Stored(merged), AdapterSum(model, adapter)
    config = AutoConfig.from_pretrained(str(merged), trust_remote_code=False)
    if bool(config.tie_word_embeddings) != bool(model.config.tie_word_embeddings):
        is_tied, was_tied = ("tied" if of.tie_word_embeddings else "not tied" for of in (config, model.config))
        raise MergeError(f"the embeddings of {merged} are {is_tied} by its config.json, those of the base {was_tied}")
    for what, names in (
        ("lacks the base's", sorted(set(expected.base) - stored.names())),
        ("holds, beyond the base's tensors,", sorted(stored.names() - set(expected.base))),
    ):
        if names:
            raise MergeError(f"{merged} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    largest, largest_in, worst, off, weights = -math.inf, "", "", 0, 0
    for name, base in expected.base.items():
        part = stored.slice(name)
        if list(part.get_shape()) != list(base.shape):
            raise MergeError(f"{name} of {merged} is {part.get_shape()}, expected {list(base.shape)}")
        weights += base.numel()
        for rows, total, slack in expected.blocks(name):
            saved = part[rows].to(total.device)
            if saved.dtype != config.dtype or not saved.dtype.is_floating_point:
                raise MergeError(f"{name} of {merged} is {saved.dtype}, its config.json says {config.dtype}")
            step = half_ulp(total, saved.dtype)
            error = (saved.double() - total).abs()
            # In half ulps, beyond what the sum may err. What is not a number is further off than anything.
            steps = torch.nan_to_num((error - slack) / step, nan=math.inf, posinf=math.inf)
            off += int((steps > 1).sum())
            at = int(steps.argmax())
            if float(steps.flatten()[at]) > largest:
                largest, largest_in = float(steps.flatten()[at]), name
                place = [int(i) for i in np.unravel_index(at, steps.shape)]
                place[0] += rows.start
                value = float(saved.flatten()[at])
                limit = f" ({config.dtype} ends at {torch.finfo(config.dtype).max:g})" if math.isinf(value) else ""
                worst = (
                    f"{name}{place} of {merged} is {value:.6g}{limit}, base + adapter {float(total.flatten()[at]):.6g}"
                )
    if off:
        raise MergeError(
            f"{worst}: {largest:.3g} half ulps of {str(config.dtype)[6:]}, where rounding explains 1; {off:,} of "
            f"{weights:,} weights are further off than that"
        )
    return {"weights": weights, "largest_weight_error": max(largest, 0.0), "largest_weight_error_in": largest_in}


def check_behaviour(model: Any, adapter: str | Path, merged: str | Path, probe: Probe) -> dict[str, Any]:
    """Prove that a merged model answers as base + adapter does, up to the rounding of its weights.

    The reference is the base with the adapter beside it, by peft. The merge is what plain transformers loads from its
    folder. Both compute in float32. Their distance is KL(reference || merge) in nats a token; see `KL_FACTOR` for the
    bound.

    Args:
        model: the merge base, as `load_merge_base` gives it. It is left without weights, to free memory.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        probe: the prompts. Rows that would take too long here are left out.

    Returns:
        `prompts`, `positions`: how many were compared.
        `kl`, `top1`: distance of the merge from the reference, and the share of equal first choices.
        `kl_bound`, `kl_rounding`, `kl_float32`: the bound, and the distances that it is made of.
        `adapter_kl`: distance of the base without the adapter.
        `trained_kl`, `trained_top1`, `trained_greedy`: see `compare_with_trained`.

    Raises:
        MergeError: plain transformers cannot load the merge, or the merge answers differently.
    """
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(merged), trust_remote_code=False).dtype
    probe, device = _cut_probe(probe, model), next(model.parameters()).device
    untrained = probe_answers(model.eval(), probe)
    reference, unsure, rounding = _measure_rounding(model, adapter, dtype, probe)
    loaded = _load_merged(merged, str(device))
    if loaded.config.vocab_size != reference.shape[-1]:
        raise MergeError(f"{merged} has {loaded.config.vocab_size:,} tokens, base + adapter {reference.shape[-1]:,}")
    answers = probe_answers(loaded, probe)
    kl, top1, bound = _divergence(reference, answers), _same_choice(reference, answers), KL_FACTOR * rounding + KL_FLOOR
    if not kl <= bound:
        raise MergeError(
            f"{merged} answers {kl:.3g} nats a token away from base + adapter, where rounding to {str(dtype)[6:]} "
            f"explains {rounding:.3g} and {bound:.3g} is allowed; its first choice is the same at {top1:.1%} of "
            f"{probe.positions.size:,} positions"
        )
    return {
        "prompts": len(probe.rows),
        "positions": int(probe.positions.size),
        "kl": kl,
        "kl_float32": unsure,
        "kl_bound": bound,
        "kl_rounding": rounding,
        "adapter_kl": _divergence(reference, untrained),
        "top1": top1,
        **compare_with_trained(loaded, answers, probe),
    }


def _measure_rounding(
    model: Any, adapter: str | Path, dtype: torch.dtype, probe: Probe
) -> tuple[torch.Tensor, float, float]:
    # Answers of base + adapter, and how far their sum is from them: in float32, and rounded to the stored type. Uses
    # the model up.
    from peft.utils import ModulesToSaveWrapper

    adapted = load_adapter(model, adapter).eval()
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.to("meta")  # whole matrices that are not used any more
    reference = probe_answers(adapted, probe)
    plain = adapted.unload()
    del adapted
    _write_sum(plain, adapter)
    unsure = _divergence(reference, probe_answers(plain, probe))
    _round_weights(plain, dtype)
    rounding = _divergence(reference, probe_answers(plain, probe))
    if not math.isfinite(rounding):
        raise MergeError(f"base + {adapter} cannot be held in {dtype}: it answers with numbers that are not finite")
    # Two orders of the same sums in float32: the more a model answers to small changes, the further they are apart.
    if not unsure <= KL_FLOOR + 1e-4 * rounding:
        raise MergeError(
            f"what the files of {adapter} add up to answers {unsure:.3g} nats a token away from what peft makes of "
            f"them, expected at most {KL_FLOOR + 1e-4 * rounding:.3g}"
        )
    plain.to("meta")  # as is `model`, which it was made of
    return reference, unsure, rounding


def _cut_probe(probe: Probe, model: Any) -> Probe:
    # The machine that checks may be slower than the one that trained.
    count = affordable_probe_rows(probe.rows, model)
    known = None if probe.log_probabilities is None else probe.log_probabilities[:count]
    return Probe(probe.rows[:count], probe.prompt_lengths[:count], probe.positions[:count], known, probe.greedy[:count])


def compare_with_trained(model: Any, answers: torch.Tensor, probe: Probe) -> dict[str, float | None]:
    """How near a model comes to the model as it was trained, by the probe.

    Args:
        model: a transformers or peft model in evaluation mode.
        answers: its log probabilities at the probe's positions, see `probe_answers`.
        probe: recorded when the training ended.

    Returns:
        `trained_kl`, the distance in nats a token; `trained_top1`, the share of equal first choices; `trained_greedy`,
        the share of recorded greedy replies that the model gives token for token. None where nothing was recorded.
    """
    result: dict[str, float | None] = dict.fromkeys(("trained_kl", "trained_top1", "trained_greedy"))
    known = probe.log_probabilities
    if known is not None and known.shape == answers.shape and bool(known.isfinite().all()):
        result |= {"trained_kl": _divergence(known, answers), "trained_top1": _same_choice(known, answers)}
    if len(probe.greedy):
        same = 0
        for row, prompt, reply in zip(probe.rows, probe.prompt_lengths, probe.greedy, strict=False):
            # Greedy decoding gives a reply if and only if each of its tokens is the first choice after those before it.
            ids = np.concatenate([row[:prompt], reply])
            [choices] = log_probabilities_of_rows(model, [ids], [np.arange(prompt - 1, len(ids) - 1)])
            same += choices.argmax(-1).tolist() == reply.tolist()
        result["trained_greedy"] = same / len(probe.greedy)
    return result


def _write_sum(model: Any, adapter: str | Path) -> None:
    import torch

    expected = AdapterSum(model, adapter)
    with torch.no_grad():
        for name in expected.base:
            for rows, total, _ in expected.blocks(name):
                expected.base[name][rows] = total
    if model.config.tie_word_embeddings:
        model.tie_weights()


def _round_weights(model: Any, dtype: torch.dtype) -> None:
    for tensor in state_without_ties(model).values():
        for rows in row_blocks(tensor):
            tensor[rows] = tensor[rows].to(dtype).to(tensor.dtype)


def _load_merged(merged: str | Path, device: Any) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(merged),
            dtype=torch.float32,
            device_map={"": str(device)},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise MergeError(f"plain transformers cannot load {merged}: {str(error).strip().splitlines()[-1]}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in report.get(what) or [])
        if names:
            raise MergeError(f"{merged} loads with {what.replace('_', ' ')}: {', '.join(names[:3])}")
    return model.eval()


def check_vocabulary(adapter: str | Path, merged: str | Path, rows: Sequence[np.ndarray]) -> None:
    """Prove that the tokenizer saved with a merge is the adapter's.

    Args:
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        rows: token ids whose texts both have to encode alike.

    Raises:
        MergeError: they differ in size, in a token, in special tokens, or in what they make of a text.
    """
    ours, theirs = load_tokenizer(adapter), load_tokenizer(merged)
    if len(ours) != len(theirs):
        raise MergeError(f"the tokenizer of {merged} has {len(theirs):,} tokens, the adapter's {len(ours):,}")
    expected_ids, ids = ours.get_vocab(), theirs.get_vocab()
    for token, number in expected_ids.items():
        if ids.get(token) != number:
            raise MergeError(
                f"token {token!r} is {ids.get(token)} in the tokenizer of {merged}, {number} in the adapter's"
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
        base, merge_base, precision: see `merge_adapter`.

    Returns:
        What `check_weights` and `check_behaviour` give, and `seconds`; numbers and text only, for the manifest.

    Raises:
        MergeError: it is not; the message says what differs.
        ValueError, FileNotFoundError: as `merge_adapter`.
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
    """What `check_merge` found, as one line for a log."""
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
