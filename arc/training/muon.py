"""Muon for the matrices of the layers, AdamW for all else: `--optim muon`.

Muon replaces the momentum of a matrix by the nearest matrix with equal singular values. A step then changes all
directions, also those with small gradients. torch.optim.Muon takes one matrix after the other: about 4,000 launches of
small kernels a step for the 168 matrices of a LoRA on 12 layers. Here all matrices of a shape are computed together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial, as torch.optim.Muon's
ITERATIONS = 5
SMALLEST = 1e-7  # norm that a matrix is divided by


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Set all singular values to about 1 (0.7 to 1.2) and keep the singular vectors, by Newton-Schulz iterations.

    `matrices` are (count, rows, columns), like the result, and of the floating type in which it computes. Zeros stay.

    Source:
        https://kellerjordan.github.io/posts/muon/; torch.optim.Muon, which differs in taking one matrix at a time.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@functools.cache
def has_bfloat16() -> bool:
    """Whether the GPU has bfloat16 arithmetic, without emulation."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with one state and one list of groups, for schedules and checkpoints.

    In groups with `use_muon`, Muon with Nesterov momentum steps the matrices; torch.optim.AdamW steps all else, with
    `betas`, `eps` and `fused`. An update of Muon is scaled by 0.2 * sqrt(max(rows, columns)): its root mean square is
    then about AdamW's, so that `lr` and the decoupled `weight_decay` mean the same to both. The iterations are computed
    in bfloat16 on GPUs that have it, else in float32.

    Source:
        Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982; torch.optim.Muon with
        adjust_lr_fn="match_rms_adamw".
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, fused: bool | None = None, momentum: float = 0.95, use_muon: bool = True,
    ):  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused, "momentum": momentum,
            "use_muon": use_muon,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient. Returns the result of the closure, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rest = []
        for group in self.param_groups:
            others: list[torch.Tensor] = []
            shapes: dict[Any, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["use_muon"] and parameter.ndim == 2:
                    key = parameter.shape, parameter.dtype, parameter.device
                    shapes.setdefault(key, []).append(parameter)
                else:
                    others.append(parameter)
            for parameters in shapes.values():
                self._step_matrices(parameters, group)
            if others:
                rest.append({**group, "params": others})
        if rest:
            adamw = torch.optim.AdamW(rest)  # a new one each time, as groups may change; that costs no kernel
            adamw.state = self.state
            adamw.step()
        return loss

    def _step_matrices(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        # Parameters of one shape.
        momentum, rate = group["momentum"], group["lr"]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(gradients, means, momentum))
        updates = orthogonalise(updates.bfloat16() if updates.is_cuda and has_bfloat16() else updates.float())
        # With the type and the layout of the parameters: else the additions below take one kernel each.
        updates = updates.contiguous().to(parameters[0].dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate * scale)
