"""Folded LoRA: one product with W + s·B·A, for ranks near the width of the layers.

A LoRA layer of rank r multiplies each token by W (out x in), A (r x in) and B (out x r). Where r is about the layer's
width, that is two to three times the work of training W. Folded, A and B are added to W once for all tokens of a pass.
For n tokens that is faster where out·in·(1 + 3·r/n) < 3·r·(out + in).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from arc.models.library_patches import change_class
from arc.models.weights import add_low_rank


def fold_lora(model: Any) -> int:
    """Have the linear LoRA layers of a model add their matrices to the weight before they multiply, in place.

    Only passes with gradients change. The sum is rounded to the weight's type: in 16 bits a change below half of a
    weight's last digit has no effect until it grows. Use it for trainings that change weights a lot, such as those of
    small models, not for small steps on pretrained weights.

    Args:
        model: a peft model with one adapter, without dropout, whose base is not quantised.

    Returns:
        How many layers were folded.

    Raises:
        ValueError: a model without LoRA layers, or with layers that cannot be folded.
    """
    from peft.tuners.lora import Linear, LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        plain = type(layer) in (Linear, _folded_class()) and len(layer.lora_A) == 1 and not layer.lora_variant
        has_dropout = any(getattr(dropout, "p", 0) for dropout in layer.lora_dropout.values())
        has_bias = any(linear.bias is not None for linear in layer.lora_B.values())
        if not plain or has_dropout or has_bias:
            raise ValueError(f"{type(layer).__name__} layers with these settings cannot be folded: only plain LoRA can")
    if not layers:
        raise ValueError("the model has no LoRA layers to fold")
    change_class(layers, _folded_class())
    return len(layers)


@contextmanager
def folded_throughout(model: Any) -> Iterator[None]:
    """Fold in passes without gradients too, so that passes over many tokens give the numbers of the update."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _folded_class())]
    for layer in layers:
        layer.folds_always = True
    try:
        yield
    finally:
        for layer in layers:
            layer.folds_always = False


@functools.cache
def _folded_class() -> type:
    import torch
    from peft.tuners.lora import Linear

    class FoldedLinear(Linear):
        folds_always = False  # see `folded_throughout`

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not (torch.is_grad_enabled() or self.folds_always) or self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            (name,) = self.active_adapters
            weight, bias = self.base_layer.weight, self.base_layer.bias
            a, b = self.lora_A[name].weight.to(weight.dtype), self.lora_B[name].weight.to(weight.dtype)
            return torch.nn.functional.linear(x, add_low_rank(weight, a, b, self.scaling[name]), bias)

    return FoldedLinear
