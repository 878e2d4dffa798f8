"""The second half of a merge's proof: the model on the disk answers as base + adapter does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.log_probabilities import log_probabilities_of_rows
from arc.merging.probe import Probe, affordable_probe_rows, probe_answers
from arc.models.lora import load_adapter
from arc.models.weights import AdapterSum, MergeError, row_blocks, state_without_ties

if TYPE_CHECKING:
    import torch

KL_FACTOR = 4.0  # of what rounding the weights explains, see `check_behaviour`
KL_FLOOR = 1e-9  # nats a token: what two orders of summation in float32 may be apart


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) in nats a token, of log probabilities (rows, positions, vocabulary)."""
    p, q = p.double(), q.double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def same_choice(p: torch.Tensor, q: torch.Tensor) -> float:
    """Share of positions at which both have the same most probable token; shapes as of `divergence`."""
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


def check_behaviour(model: Any, adapter: str | Path, merged: str | Path, probe: Probe) -> dict[str, Any]:
    """Prove that a merged model answers as base + adapter does, up to what rounding its weights explains.

    The reference is the base with the adapter beside it, not merged, by peft. The merge is what plain transformers
    loads from its folder. Both compute in float32. Their distance is KL(reference || merge) in nats a token.

    The bound. A merge errs by rounding each weight once, and errors d move the answers by KL = 1/2 d'Fd to second order
    (F: the Fisher information). F is not known, so the effect of rounding is measured on this very model: the sum of
    base and adapter is computed again from the adapter's files, each weight is rounded to the stored type, and this
    model is asked. A right merge differs from it only in weights so near the middle between two numbers that the order
    of a float32 sum decides. Measured on 200 tiny trained models (tied and not, 4 and 16 bits, bf16 and fp16 stored,
    learning rates from 1e-5 to 1e-2), the merge's KL was 0.74 to 1.10 times that of the rounding. The extremes are
    float16's, where 0.05% of the weights are so decided. `KL_FACTOR` allows 4 times, which is twice the distance in the
    answers. `KL_FLOOR` covers float32's own uncertainty (less than 1e-12 there).

    Random errors are no yardstick: on 36 of the models, the KL of independent errors of up to half an ulp was 0.3 to 16
    times the merge's. Where an adapter's changes are smaller than half an ulp, rounding undoes them: such errors are
    not random, they all point against what was learned. The merge is right nevertheless; how much it lost shows in `kl`
    beside `adapter_kl`.

    Args:
        model: the merge base, as `load_merge_base` gives it. It is left without weights, to make room.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        probe: rows to ask; a slow machine asks fewer of them.

    Returns:
        `prompts` and `positions`, their numbers; `kl`; `kl_bound`; `kl_rounding`, which the bound is computed from;
        `kl_float32`, between two orders of the same sums; `adapter_kl`, of the base alone: what the adapter changes;
        `top1`, the share of positions with the reference's first choice. Compared with the model as it was trained, and
        None where the probe does not say: `trained_kl`, `trained_top1`, and `trained_greedy`, the share of the recorded
        greedy replies that the merge gives token for token.

    Raises:
        MergeError: plain transformers cannot load the whole merge, or it answers otherwise.
    """
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(merged), trust_remote_code=False).dtype
    probe, device = _affordable_part(probe, model), next(model.parameters()).device
    untrained = probe_answers(model.eval(), probe)
    reference, unsure, rounding = _reference_answers(model, adapter, probe, dtype)

    loaded = _load_merged(merged, str(device))
    if loaded.config.vocab_size != reference.shape[-1]:
        raise MergeError(f"{merged} has {loaded.config.vocab_size:,} tokens, base + adapter {reference.shape[-1]:,}")
    answers = probe_answers(loaded, probe)
    kl, top1, bound = divergence(reference, answers), same_choice(reference, answers), KL_FACTOR * rounding + KL_FLOOR
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
        "adapter_kl": divergence(reference, untrained),
        "top1": top1,
        **_compare_with_trained(loaded, answers, probe),
    }


def _affordable_part(probe: Probe, model: Any) -> Probe:
    """The rows of a probe that this machine can afford; it may be slower than the one that trained."""
    count = affordable_probe_rows(probe.rows, model)
    known = None if probe.log_probabilities is None else probe.log_probabilities[:count]
    return Probe(probe.rows[:count], probe.prompt_lengths[:count], probe.positions[:count], known, probe.greedy[:count])


def _reference_answers(
    model: Any, adapter: str | Path, probe: Probe, dtype: torch.dtype
) -> tuple[torch.Tensor, float, float]:
    """Answers of base + adapter, their KL to another order of the same sums, and to the sums rounded to `dtype`.

    The weights of `model` are used up: it ends on the meta device.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    adapted = load_adapter(model, adapter).eval()
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.to("meta")  # whole matrices that are not used any more
    reference = probe_answers(adapted, probe)
    plain = adapted.unload()
    del adapted
    expected = AdapterSum(plain, adapter)
    with torch.no_grad():
        for name in expected.base:
            for rows, total, _ in expected.blocks(name):
                expected.base[name][rows] = total
    if plain.config.tie_word_embeddings:
        plain.tie_weights()
    unsure = divergence(reference, probe_answers(plain, probe))
    for tensor in state_without_ties(plain).values():
        for rows in row_blocks(tensor):
            tensor[rows] = tensor[rows].to(dtype).to(tensor.dtype)
    rounding = divergence(reference, probe_answers(plain, probe))
    if not math.isfinite(rounding):
        raise MergeError(f"base + {adapter} cannot be held in {dtype}: it answers with numbers that are not finite")
    # The more a model reacts to small changes, the further apart are two orders of the same sums in float32.
    if not unsure <= KL_FLOOR + 1e-4 * rounding:
        raise MergeError(
            f"what the files of {adapter} add up to answers {unsure:.3g} nats a token away from what peft makes of "
            f"them, expected at most {KL_FLOOR + 1e-4 * rounding:.3g}"
        )
    plain.to("meta")  # as is `model`, whose weights these are
    return reference, unsure, rounding


def _load_merged(merged: str | Path, device: str) -> Any:
    """Load a merge as its users will, in float32.

    Raises:
        MergeError: it cannot be loaded, or not with exactly the weights that its configuration asks for.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(merged),
            dtype=torch.float32,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise MergeError(f"plain transformers cannot load {merged}: {str(error).strip().splitlines()[-1]}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in report.get(problem) or [])
        if names:
            raise MergeError(f"{merged} loads with {problem.replace('_', ' ')}: {', '.join(names[:3])}")
    return model.eval()


def _compare_with_trained(model: Any, answers: torch.Tensor, probe: Probe) -> dict[str, float | None]:
    """`trained_kl`, `trained_top1` and `trained_greedy` of `check_behaviour`."""
    result: dict[str, float | None] = dict.fromkeys(("trained_kl", "trained_top1", "trained_greedy"))
    known = probe.log_probabilities
    if known is not None and known.shape == answers.shape and bool(known.isfinite().all()):
        result |= {"trained_kl": divergence(known, answers), "trained_top1": same_choice(known, answers)}
    if len(probe.greedy):
        same = 0
        for row, prompt, reply in zip(probe.rows, probe.prompt_lengths, probe.greedy, strict=False):
            # Greedy decoding gives a reply if and only if each of its tokens is the first choice after those before it.
            ids = np.concatenate([row[:prompt], reply])
            [choices] = log_probabilities_of_rows(model, [ids], [np.arange(prompt - 1, len(ids) - 1)])
            same += choices.argmax(-1).tolist() == reply.tolist()
        result["trained_greedy"] = same / len(probe.greedy)
    return result
