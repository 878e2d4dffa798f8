"""What a merge starts from: the base and its format, and where the sum is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arc.models.loading import Precision, load_model
from arc.models.manifests import read_manifest
from arc.models.weights import ADAPTER_WEIGHTS, dequantised_weight


@dataclass(frozen=True)
class MergePlan:
    """What an adapter is merged onto.

    Attributes:
        base: the 16-bit base folder, or a hub name.
        precision: how the base was loaded in training; None if that is not known.
        quantised: the same, if the merge is onto the 4-bit base; None if it is onto the 16-bit weights.
    """

    base: str | Path
    precision: Precision | None
    quantised: Precision | None


def plan_merge(adapter: str | Path, base: str | Path | None, merge_base: str, precision: Precision | None) -> MergePlan:
    """Decide what an adapter is merged onto; arguments and errors are those of `merge.merge_adapter`."""
    from peft import PeftConfig

    if merge_base not in ("quantised", "original"):
        raise ValueError(f"merge_base is {merge_base!r}: expected 'quantised' or 'original'")
    if not (Path(adapter) / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{adapter} has no {ADAPTER_WEIGHTS}: expected the folder of an adapter")
    if precision is None:
        recorded = read_manifest(adapter).get("precision")
        if recorded is None and merge_base == "quantised":
            raise ValueError(f"{adapter} does not record how its base was loaded: merge with --merge_base original")
        precision = Precision(**recorded) if recorded else None
    quantised = precision if merge_base == "quantised" and precision is not None and precision.load_in_4bit else None
    return MergePlan(base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path, precision, quantised)


def merge_device() -> str:
    """The device that merges are computed on: "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_merge_base(base: str | Path, precision: Precision | None, device: str = "cpu") -> Any:
    """Load a base in float32; if `precision` says 4 bits, with its linear layers as 4-bit training saw them.

    Args:
        base: a 16-bit model folder.
        precision: how it was loaded in training, or None for the 16-bit weights.
        device: where to quantise. The 4-bit values are those of the training on the same kind of device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, device_map={"": device}, trust_remote_code=False, use_safetensors=True
    )
    if precision is None or not precision.load_in_4bit:
        return model
    import bitsandbytes as bnb

    trained, _ = load_model(base, replace(precision, engine="transformers"))
    with torch.no_grad():
        for name, module in trained.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # Rounded to the compute type first, as each forward pass of the training did; then exact in float32.
                weight = dequantised_weight(module).to(precision.torch_dtype)
                model.get_submodule(name).weight.copy_(weight)
            else:
                for own, value in module.named_parameters(recurse=False):
                    model.get_submodule(name).get_parameter(own).copy_(value)
    return model
