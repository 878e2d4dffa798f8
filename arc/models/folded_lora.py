"""LoRA on the weights instead of the activations: one product with W + s·B·A, for ranks near the layers' own width.

A LoRA layer of rank r multiplies each token by W (out x in), by A (r x in) and by B (out x r), and its backward pass
each of these again. Where r is about as large as the layer is wide, that is two to three times the work of training W
itself. Added to W first, once for all tokens of a pass, it is as much work as training W: a pass of n tokens is quicker
where out·in·(1 + 3·r/n) is less than 3·r·(out + in).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from arc.models.library_patches import change_class
from arc.models.weights import add_low_rank


def fold_lora(model: Any) -> int:
    """Have a model's linear LoRA layers add their matrices to the weight before they multiply, in place.

    Only where gradients are computed: decoding, measuring and saving are as before. The sum is rounded to the weight's
    type, so that in 16 bits a change below half of a weight's last digit is not seen before it has grown: for trainings
    that change weights a lot, as those of small models from little before; not for small steps on pretrained weights.

    Args:
        model: a peft model with one adapter, without dropout, whose base is not quantised.

    Returns:
        How many layers compute so.

    Raises:
        ValueError: a model with none, or with layers that cannot.
    """
    from peft.tuners.lora import Linear, LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        plain = type(layer) in (Linear, _folded_class()) and len(layer.lora_A) == 1 and not layer.lora_variant
        more = [part for part in layer.lora_dropout.values() if getattr(part, "p", 0)]
        more += [part for part in layer.lora_B.values() if part.bias is not None]
        if not plain or more:
            raise ValueError(f"{type(layer).__name__} layers with these settings cannot be folded: only plain LoRA can")
    if not layers:
        raise ValueError("the model has no LoRA layers to fold")
    change_class(layers, _folded_class())
    return len(layers)


@contextmanager
def folded_throughout(model: Any) -> Iterator[None]:
    """Have folded layers compute so without gradients too: for passes over many tokens, which are then as the update's.

    Args:
        model: any; layers that are not folded are left as they are.
    """
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
        """peft's layer, with another forward pass where gradients are computed."""

        folds_always = False  # see `folded_throughout`

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not (torch.is_grad_enabled() or self.folds_always) or self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            (name,) = self.active_adapters
            weight, bias = self.base_layer.weight, self.base_layer.bias
            a, b = self.lora_A[name].weight.to(weight.dtype), self.lora_B[name].weight.to(weight.dtype)
            return torch.nn.functional.linear(x, add_low_rank(weight, a, b, self.scaling[name]), bias)

    return FoldedLinear
