"""The first half of a merge's proof: every weight is base + adapter, rounded once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.weights import AdapterSum, MergeError

if TYPE_CHECKING:
    import torch


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between `dtype`'s numbers at x: the largest error of rounding x to it; subnormals included."""
    import torch

    numbers = torch.finfo(dtype)
    _, exponent = torch.frexp(x)
    # frexp gives x = m * 2**exponent with m in [0.5, 1), so x's binade begins at 2**(exponent - 1); 0 is 0 * 2**0.
    lowest = round(math.log2(numbers.smallest_normal))
    binade = torch.where(x == 0, lowest, exponent - 1).clamp(min=lowest)
    return torch.ldexp(torch.full_like(x, numbers.eps / 2), binade)


def check_weights(model: Any, adapter: str | Path, merged: str | Path) -> dict[str, Any]:
    """Prove that every weight of a merged model is base + adapter, rounded once.

    The sum is computed again in float64, from the adapter's files. A stored weight may differ from it by half an ulp of
    its type, plus the error that a sum in float32 may have.

    Args:
        model: the merge base, as `load_merge_base` gives it.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.

    Returns:
        `weights`, their number; `largest_weight_error` in half ulps of the stored type, beyond the error of the
        float32 sum (so at most 1); `largest_weight_error_in`, the tensor that has it.

    Raises:
        MergeError: a tensor is missing, left over, of another shape or type, or wrong; the worst weight is named.
    """
    from transformers import AutoConfig

    stored, expected = _StoredTensors(merged), AdapterSum(model, adapter)
    config = AutoConfig.from_pretrained(str(merged), trust_remote_code=False)
    _check_names(model.config, config, set(expected.base), stored.names(), merged)
    largest, largest_in, worst, off, weights = -math.inf, "", "", 0, 0
    for name, base in expected.base.items():
        tensor = stored.slice(name)
        if list(tensor.get_shape()) != list(base.shape):
            raise MergeError(f"{name} of {merged} is {tensor.get_shape()}, expected {list(base.shape)}")
        weights += base.numel()
        for rows, total, slack in expected.blocks(name):
            saved = tensor[rows].to(total.device)
            if saved.dtype != config.dtype or not saved.dtype.is_floating_point:
                raise MergeError(f"{name} of {merged} is {saved.dtype}, its config.json says {config.dtype}")
            errors = _half_ulps_off(saved, total, slack)
            off += int((errors > 1).sum())
            at = int(errors.argmax())
            if float(errors.flatten()[at]) > largest:
                largest, largest_in = float(errors.flatten()[at]), name
                worst = _describe_weight(f"{name}{{}} of {merged}", saved, total, at, rows.start)
    if off:
        raise MergeError(
            f"{worst}: {largest:.3g} half ulps of {str(config.dtype)[6:]}, where rounding explains 1; {off:,} of "
            f"{weights:,} weights are further off than that"
        )
    return {"weights": weights, "largest_weight_error": max(largest, 0.0), "largest_weight_error_in": largest_in}


def _check_names(base_config: Any, config: Any, expected: set[str], stored: set[str], merged: str | Path) -> None:
    """Raise MergeError unless the merge has the base's tensors, no others, and tied embeddings if the base has."""
    if bool(config.tie_word_embeddings) != bool(base_config.tie_word_embeddings):
        is_tied, was_tied = ("tied" if of.tie_word_embeddings else "not tied" for of in (config, base_config))
        raise MergeError(f"the embeddings of {merged} are {is_tied} by its config.json, those of the base {was_tied}")
    for problem, names in (
        ("lacks the base's", sorted(expected - stored)),
        ("holds, beyond the base's tensors,", sorted(stored - expected)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise MergeError(f"{merged} {problem} {names[0]}{more}")


def _half_ulps_off(saved: torch.Tensor, total: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    """How far stored weights are from the sum, in half ulps, beyond what a float32 sum may err; NaN counts as inf."""
    import torch

    error = (saved.double() - total).abs()
    return torch.nan_to_num((error - slack) / half_ulp(total, saved.dtype), nan=math.inf, posinf=math.inf)


def _describe_weight(name: str, saved: torch.Tensor, total: torch.Tensor, at: int, first_row: int) -> str:
    """One weight as text; `at` is its place in the flattened block that begins at `first_row` of its tensor."""
    import torch

    place = [int(i) for i in np.unravel_index(at, saved.shape)]
    place[0] += first_row
    value = float(saved.flatten()[at])
    limit = f" ({saved.dtype} ends at {torch.finfo(saved.dtype).max:g})" if math.isinf(value) else ""
    return f"{name.format(place)} is {value:.6g}{limit}, base + adapter {float(total.flatten()[at]):.6g}"


class _StoredTensors:
    """The tensors of a model folder, read from disk when they are asked for.

    Args:
        folder: of the model.

    Raises:
        MergeError: there are no safetensors, or a file is damaged.
    """

    def __init__(self, folder: str | Path):
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self._file_of: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(str(folder / name), "pt")
                self._file_of |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                raise MergeError(f"{folder / name} cannot be read ({error})") from None

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def slice(self, name: str) -> Any:
        """A tensor whose rows are read when it is indexed."""
        return self._file_of[name].get_slice(name)
