"""What a merge is made from: the base in its formats, and where it is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arc.models.loading import Precision, load_model
from arc.models.manifests import read_manifest
from arc.models.weights import ADAPTER_WEIGHTS, dequantised_weight


@dataclass(frozen=True)
class MergePlan:
    """What is merged onto what.

    Args:
        base: the 16-bit base, a folder or hub name.
        precision: how the base was loaded in training; None if the adapter does not say.
        quantised: the precision of the 4-bit base to merge onto; None: the 16-bit weights.
    """

    base: str | Path
    precision: Precision | None
    quantised: Precision | None


def plan_merge(adapter: str | Path, base: str | Path | None, merge_base: str, precision: Precision | None) -> MergePlan:
    """Decide what an adapter is merged onto.

    Args:
        adapter, base, merge_base, precision: see `merge.merge_adapter`.

    Raises:
        ValueError: unknown `merge_base`, or an adapter that does not record how its base was loaded.
        FileNotFoundError: the adapter has no safetensors file.
    """
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
    """Where merges are computed: "cuda" if there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_merge_base(base: str | Path, precision: Precision | None, device: str = "cpu") -> Any:
    """Load a base in float32; if `precision` is given, with the linear layers that 4-bit training used.

    Args:
        base: a 16-bit model folder.
        precision: how the base was loaded in training; None: the 16-bit weights.
        device: where to quantise. Only the same kind of device as in training gives the same 4-bit values.
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
                for parameter, value in module.named_parameters(recurse=False):
                    model.get_submodule(name).get_parameter(parameter).copy_(value)
    return model
