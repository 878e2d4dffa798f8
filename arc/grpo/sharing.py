"""Two choices of stage 3: whether completions are sampled from a plain copy, and whether groups share a prompt."""

from __future__ import annotations

from typing import Any

from arc.grpo.settings import PolicyRun, PolicySettings
from arc.models.packing import can_pack, check_full_attention
from arc.runs.needs import count_weights
from arc.runs.processes import process_count

COPY_ROOM = 6  # a copy is the default on GPUs with at least this many times its memory


def samples_from_copy(model: Any, settings: PolicySettings, engine: str) -> bool:
    """Whether completions are sampled from a plain copy of the model. The default depends on the GPU's memory."""
    import torch

    if settings.fast_rollouts is not None or not torch.cuda.is_available():
        return bool(settings.fast_rollouts)
    if settings.stop_at_error:
        return False  # one forward pass of the model itself samples all completions
    if settings.needs_sharing and engine == "unsloth":
        return True  # Unsloth shares prompts only where completions come from a copy
    return torch.cuda.get_device_properties(0).total_memory >= COPY_ROOM * copy_bytes(model, settings)


def copy_bytes(model: Any, settings: PolicySettings) -> int:
    """Memory of a plain 16-bit copy of a model, in bytes."""
    return 2 * count_weights(model.config, target_modules=settings.target_modules, r=settings.lora_r).model


def shares_prompts(model: Any, run: PolicyRun) -> bool:
    """Whether a prompt is computed once for all completions of its group. The default: where the device can."""
    settings, precision = run.settings, run.precision
    if settings.needs_sharing:
        return True
    if settings.shared_prompts is False:
        return False
    if precision.engine == "unsloth" and not samples_from_copy(model, settings, precision.engine):
        return False  # Unsloth's generate works with Unsloth's trainer only
    return can_pack(model, precision.torch_dtype)


def check_sharing(run: PolicyRun) -> None:
    """Raise ValueError if settings need shared prompts that this engine or model cannot have."""
    from transformers import AutoConfig

    settings, flag = run.settings, run.settings.needs_sharing
    if flag is None:
        return
    if run.precision.engine == "unsloth" and settings.fast_rollouts is False and not settings.stop_at_error:
        raise ValueError(f"{flag}: on the Unsloth engine not with --fast_rollouts false")
    if settings.supervised_weight and settings.supervised_batch_size % process_count():
        raise ValueError(
            f"--supervised_batch_size {settings.supervised_batch_size}: {process_count()} processes cannot divide it"
        )
    check_full_attention(AutoConfig.from_pretrained(run.parent))
