"""Muon for the matrices of the layers, AdamW for all else: `--optim muon`.

Muon makes of each matrix's momentum the nearest matrix whose singular values are all alike, so that a step changes all
directions, also those in which gradients are small. torch.optim.Muon takes one matrix after the other: for the 168 of a
LoRA on 12 layers, some 4,000 launches of small kernels a step. Here all matrices of a shape are computed together.
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
    """Matrices with the same singular vectors and singular values near 1 (0.7 to 1.2), by Newton-Schulz iterations.

    Zeros stay zeros.

    Args:
        matrices: (count, rows, columns), of a floating type in which is computed.

    Returns:
        The same shape and type.

    Source:
        https://kellerjordan.github.io/posts/muon/; as in torch.optim.Muon, but for many matrices at once.
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
    """Whether the GPU computes in bfloat16 by itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with one state and one list of groups, for schedules and checkpoints.

    In groups whose `use_muon` is true, matrices are stepped by Muon with Nesterov momentum; what is no matrix, and all
    of the other groups, by torch.optim.AdamW. A matrix's update is scaled by 0.2 * sqrt(max(rows, columns)), so that
    its root mean square is about that of AdamW's: learning rates and weight decay mean the same to both. On GPUs that
    have it the iterations are computed in bfloat16, elsewhere, where that is slower, in float32.

    Args:
        params: parameters, or groups of them; a group may set each of the other arguments.
        lr: learning rate.
        betas, eps, fused: of AdamW.
        weight_decay: decoupled, of both.
        momentum: of Muon.
        use_muon: whether matrices are stepped by Muon.

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
        """Step all parameters that have a gradient; returns what the closure does, None without one."""
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
            for alike in shapes.values():
                self._step_matrices(alike, group)
            if others:
                rest.append({**group, "params": others})
        if rest:
            adamw = torch.optim.AdamW(rest)  # made anew, as groups may have changed; it costs no kernel
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
        # Of the parameters' type and laid out as they are: else each is a kernel of its own below.
        updates = updates.contiguous().to(parameters[0].dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate * scale)
