"""One cast of all adapters in a forward pass, in place of three of each: for Unsloth's LoRA layers.

Adapters are trained in float32, and Unsloth multiplies in 16 bits: it rounds each matrix where the forward pass needs
it and again where the backward pass does, and autograd widens each gradient. For a model of 1B these are 672 launches
of small kernels in each pass. Here all matrices are rounded by one call when the first is asked for, the layers get
what is made, and all gradients are widened by one call when the backward pass has made the last of them.

The numbers are the same: each matrix is rounded once from float32, each gradient is made in 16 bits and widened, and
gradients of several passes add up in float32. On a CPU they are equal bit for bit, with layers that compute as
Unsloth's do (tests); on CUDA losses were compared (benchmarks/README.md). What it takes is memory: the rounded matrices
live until the backward pass is done with them, 2 bytes a weight of all adapters, and their gradients until its end, as
many more, and 4 more where a step has several passes.
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

MOST_MEMORY = 0.05  # of a GPU's, that the casts may take: smaller cards need it for activations

_running: AdapterCasts | None = None  # whose forward pass is under way


def cast_adapters_together(model: Any, dtype: torch.dtype) -> int:
    """Have Unsloth's layers of a model share one cast of their adapters in each pass of a training, in place.

    Only in forward passes of a model in training mode, with gradients and without checkpointing, of a run of one
    process. In all others, and in what is traced to be compiled, Unsloth reads and casts its adapters as ever:
    checkpointing computes layers again when the pass is over, and processes exchange gradients while the backward pass
    makes others, not all at its end.

    Args:
        model: a peft model of the Unsloth engine, with adapters that are trained in float32.
        dtype: of the activations: bfloat16 or float16.

    Returns:
        How many matrices are cast together; 0, and nothing is changed, where there is nothing to gain: no adapters, too
        little GPU memory, or an Unsloth that reads them otherwise.
    """
    casts = AdapterCasts(model, dtype)
    if not casts.weights:
        return 0
    count = sum(weight.numel() for weight in casts.weights)
    if count * dtype.itemsize > MOST_MEMORY * _memory(casts.weights[0].device):
        return 0
    if wrap_unsloth_reader(reading_casts) is None:
        return 0
    model.register_forward_pre_hook(casts.begin)
    model.register_forward_hook(casts.end, always_call=True)  # also where a pass runs out of memory
    return len(casts.weights)


def _memory(device: torch.device) -> float:
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class AdapterCasts:
    """The adapters of a model, and what they were cast to in the forward pass that is under way.

    Args:
        model: a peft model.
        dtype: what they are cast to.

    Attributes:
        weights: the LoRA matrices that are trained, float32 (rank, in) and (out, rank).
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        """See the class."""
        from peft.tuners.lora import LoraLayer

        self.dtype = dtype
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        parts = [part for layer in layers for pair in (layer.lora_A, layer.lora_B) for part in pair.values()]
        self.weights = [part.weight for part in parts if part.weight.requires_grad]
        # Not the wrappers, which ask what they wrap.
        flag = "gradient_checkpointing"
        self.flagged = [m for m in model.modules() if flag in vars(m) or hasattr(type(m), flag)]
        self.casts: dict[int, torch.Tensor] | None = None  # by id of the weight; None: not made yet

    def begin(self, model: Any, args: Any) -> None:
        """A forward pre-hook: from here on layers get casts, if this is a pass that may have them."""
        global _running
        import torch

        on = model.training and torch.is_grad_enabled() and not several_processes()
        on = on and not any(module.gradient_checkpointing for module in self.flagged)
        _running, self.casts = (self if on else None), None

    def end(self, model: Any, args: Any, output: Any) -> None:
        """A forward hook: layers read their adapters as ever; what the backward pass needs, autograd keeps."""
        global _running
        _running, self.casts = None, None

    def take(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """The cast of a weight; the weight itself where there is none, or where it was taken already.

        A second gradient of a weight is thereby added to the first in float32, as without casts.
        """
        import torch

        if weight is None:  # adapters are switched off
            return None
        if self.casts is None:
            own = [own for own in self.weights if own.requires_grad and own.dtype == torch.float32]
            made = cast_function().apply(self.dtype, *own) if own else ()
            self.casts = {id(own): cast for own, cast in zip(own, made, strict=True)}
        return self.casts.pop(id(weight), weight)


def reading_casts(plain: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], tuple[Any, ...]]:
    """Unsloth's `get_lora_parameters`, which gives casts of the adapters while a pass that has them is under way.

    Args:
        plain: Unsloth's own: of a layer, gives its weight, the weight's quantisation, A, B and their factor.
    """
    import torch

    if getattr(plain, "reads_casts", False):
        return plain

    @functools.wraps(plain)
    def get_lora_parameters(proj: Any) -> tuple[Any, ...]:
        found = plain(proj)
        # Compiled layers, as Unsloth's are on padded rows, cast within their own kernels. Asked first: nothing else
        # that changes from pass to pass shall be compiled in. Without gradients nobody would widen them either.
        if torch.compiler.is_compiling() or _running is None or not torch.is_grad_enabled():
            return found
        weight, quantisation, a, b, scaling = found
        return weight, quantisation, _running.take(a), _running.take(b), scaling

    vars(get_lora_parameters)["reads_casts"] = True
    return get_lora_parameters


@functools.cache
def cast_function() -> Any:
    """An autograd function: of a type and float32 tensors, gives them in that type; gradients come back in float32.

    All are cast by one call, and all gradients that there are by another: PyTorch packs them into few launches. Each
    is a tensor of its own, not a part of a large one: they end on the allocator's borders, where matrix products find
    them as they find single casts, and each is freed when the backward pass is done with it.
    """
    # Made when it is first wanted: torch is not imported with this file.
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

    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made
