"""One cast of all adapters in a forward pass, for Unsloth's LoRA layers.

Adapters are trained in float32, and Unsloth multiplies in 16 bits. It casts each matrix in the forward pass and again
in the backward pass, and autograd casts each gradient: 672 launches of small kernels a pass for a 1B model. Here one
call casts all matrices when the first layer reads its adapter. One call casts all gradients at the end of the backward
pass. The numbers are the same. The casts take 2 bytes a weight until the backward pass has used them. Their gradients
take 2 more until its end, and 4 more where a step has several passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from arc.models.library_patches import wrap_unsloth_reader
from arc.models.loading import several_processes

if TYPE_CHECKING:
    import torch

MOST_MEMORY = 0.05  # share of the GPU memory that the casts may take: smaller cards need it for activations

_running: AdapterCasts | None = None  # the casts of the present forward pass


def cast_adapters_together(model: Any, dtype: torch.dtype) -> int:
    """Have Unsloth's layers of a model share one cast of their adapters in each training pass, in place.

    This applies to forward passes in training mode, with gradients, without checkpointing, in a run of one process.
    Checkpointing computes layers again after the pass. Several processes exchange gradients during the backward pass.
    There, and in compiled layers, Unsloth casts its adapters itself.

    Args:
        model: a peft model of the Unsloth engine, with adapters that are trained in float32.
        dtype: of the activations: bfloat16 or float16.

    Returns:
        How many matrices are cast together. 0, and nothing changes: no adapters, too little GPU memory, or an Unsloth
        that reads adapters in another way.
    """
    casts = AdapterCasts(model, dtype)
    size = sum(weight.numel() for weight in casts.weights) * dtype.itemsize
    if not size or size > MOST_MEMORY * _memory(casts.weights[0].device) or wrap_unsloth_reader(reading_casts) is None:
        return 0
    model.register_forward_pre_hook(casts.begin)
    model.register_forward_hook(casts.end, always_call=True)  # also when a pass runs out of memory
    return len(casts.weights)


def _memory(device: torch.device) -> float:
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class AdapterCasts:
    """The adapters of a peft model, and their casts to a type in the present forward pass."""

    def __init__(self, model: Any, dtype: torch.dtype):
        from peft.tuners.lora import LoraLayer

        self.dtype = dtype
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        linears = [linear for layer in layers for pair in (layer.lora_A, layer.lora_B) for linear in pair.values()]
        # The LoRA matrices that are trained, float32 (rank, in) and (out, rank).
        self.weights = [linear.weight for linear in linears if linear.weight.requires_grad]
        # Only modules with a flag of their own, not wrappers that look it up in the wrapped module.
        flag = "gradient_checkpointing"
        self.flagged = [m for m in model.modules() if flag in vars(m) or hasattr(type(m), flag)]
        self.casts: dict[int, torch.Tensor] | None = None  # by id of the weight; None before the first read

    def begin(self, model: Any, args: Any) -> None:
        """A forward pre-hook: from here on layers get casts, if this pass may have them."""
        global _running
        import torch

        on = model.training and torch.is_grad_enabled() and not several_processes()
        on = on and not any(module.gradient_checkpointing for module in self.flagged)
        _running, self.casts = (self if on else None), None

    def end(self, model: Any, args: Any, output: Any) -> None:
        """A forward hook: the pass is over; autograd holds what the backward pass needs."""
        global _running
        _running, self.casts = None, None

    def take(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """The cast of a weight, once; the weight itself if it has no cast or the cast was taken before.

        So autograd adds up several gradients of the weight in float32, as without casts.
        """
        import torch

        if weight is None:  # adapters are switched off
            return None
        if self.casts is None:
            trained = [each for each in self.weights if each.requires_grad and each.dtype == torch.float32]
            casts = cast_function().apply(self.dtype, *trained) if trained else ()
            self.casts = {id(each): cast for each, cast in zip(trained, casts, strict=True)}
        return self.casts.pop(id(weight), weight)


def reading_casts(plain: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], tuple[Any, ...]]:
    """Unsloth's `get_lora_parameters`, which returns the casts of the adapters in passes that have them."""
    import torch

    if getattr(plain, "reads_casts", False):
        return plain

    @functools.wraps(plain)
    def get_lora_parameters(proj: Any) -> tuple[Any, ...]:
        parameters = plain(proj)
        # Compiled layers, as Unsloth's are on padded rows, cast inside their kernels. This comes first: compiled code
        # must not depend on anything that changes from pass to pass.
        if torch.compiler.is_compiling() or _running is None or not torch.is_grad_enabled():
            return parameters
        weight, quantisation, a, b, scaling = parameters
        return weight, quantisation, _running.take(a), _running.take(b), scaling

    vars(get_lora_parameters)["reads_casts"] = True
    return get_lora_parameters


@functools.cache
def cast_function() -> Any:
    """An autograd function that casts float32 tensors to a type, and their gradients back, each in few launches.

    Each result is a separate tensor: aligned as a single cast is, and freed as soon as the backward pass has used it.
    """
    import torch
    from torch.autograd.function import once_differentiable

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ctx.set_materialize_grads(False)
            return tuple(_cast_all(weights, dtype))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            wide = iter(_cast_all([gradient for gradient in gradients if gradient is not None], torch.float32))
            return None, *(None if gradient is None else next(wide) for gradient in gradients)

    return Cast


def _cast_all(tensors: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    import torch

    casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if casts:
        torch._foreach_copy_(casts, list(tensors))
    return casts
