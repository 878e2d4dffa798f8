"""Base + adapter: the sums of weights, in memory and from files, and what a 4-bit weight stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BLOCK = 2**22  # weights that are summed and compared at once
UNKNOWN_OPTIONS = (  # of peft's LoRA, which `AdapterSum` cannot add up
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "alpha_pattern", "layer_replication", "lora_bias",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
)  # fmt: skip


def saved_dtype(folder: str | Path) -> torch.dtype:
    """The 16-bit type that a model folder is stored in (bfloat16 for one stored in float32)."""
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def dequantised_weight(layer: Any) -> torch.Tensor:
    """The weight of a linear layer, (out, in); of a 4-bit layer as its forward pass computes with it."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight.data, state)


def add_low_rank(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling * B A, (out, in), rounded once to the type of W; A is (rank, in), B (out, rank), of the same type.

    peft's `get_delta_weight` rounds the product, the scaled product and the sum, each by itself: other bytes.
    """
    return weight.addmm(b, a, alpha=scaling)


def summed_weights(trained: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the base, and base + adapter, of each weight of a peft model in memory; sums are float32."""
    from peft.tuners.lora import LoraLayer

    for name, module in trained.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            weight = dequantised_weight(layer).float()
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    a, b = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
                    weight = add_low_rank(weight, a, b, module.scaling[adapter])
            yield f"{name}.weight", weight
            if getattr(layer, "bias", None) is not None:
                yield f"{name}.bias", layer.bias
        elif not {"lora_A", "lora_B", "base_layer", "original_module"} & set(name.split(".")):
            plain = name.replace(".modules_to_save.default", "")
            for parameter, value in module.named_parameters(recurse=False):
                if value.dim() and type(value).__name__ != "Params4bit":
                    yield f"{plain}.{parameter}", value


class AdapterSum:
    """Base + adapter in float64, weight by weight, from the adapter's files and without peft: what a merge must equal.

    The embedding stands for both of two tied weights.

    Raises:
        MergeError: the adapter has a tensor without a place in the model, or is of an unknown kind.
    """

    def __init__(self, model: Any, adapter: str | Path):
        self.adapter = Path(adapter)
        self.config = json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        self.base = state_without_ties(model)
        self._head, self._embedding = _embedding_names(model)
        self._tied = bool(model.config.tie_word_embeddings)
        self._low_rank: dict[str, dict[str, str]] = {}  # weight -> "A.weight" and so on -> tensor of the adapter
        self._full: dict[str, str] = {}  # weight -> tensor of the adapter that replaces it
        used = [name for name in UNKNOWN_OPTIONS if self.config.get(name)]
        if self.config.get("peft_type") != "LORA" or used:
            kind = ", ".join(used) or self.config.get("peft_type")
            raise MergeError(f"{self.adapter} uses {kind}, which this check cannot add up: expected plain LoRA")
        self._sort_tensors()

    def _sort_tensors(self) -> None:
        import torch

        with self._open() as file:
            for tensor in file.keys():
                name = tensor.removeprefix("base_model.model.")
                module, _, rest = name.partition(".lora_")
                if rest in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
                    self._low_rank.setdefault(self._place(f"{module}.weight", tensor), {})[rest] = tensor
                else:
                    name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
                    other = self._full.setdefault(self._place(name, tensor), tensor)
                    if other != tensor and not torch.equal(file.get_tensor(other), file.get_tensor(tensor)):
                        raise MergeError(f"{self.adapter} holds two matrices, {other} and {tensor}, for one tied one")
        tied = {self._embedding, self._head} if self._tied else set()
        if tied & set(self._low_rank):
            raise MergeError(
                f"{self.adapter} has a low-rank change of one of two tied matrices ({self._embedding}): a tied model "
                "cannot hold the sum; untie the base before training, or train the matrix in full"
            )
        incomplete = [name for name, factors in self._low_rank.items() if len(factors) != 2]
        if incomplete:
            raise MergeError(f"{self.adapter} has half of a low-rank change only for {incomplete[0]}")

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt")

    def _place(self, name: str, tensor: str) -> str:
        # A tied model has one matrix for both names.
        place = self._embedding if self._tied and name == self._head else name
        if place is None or place not in self.base:
            raise MergeError(f"{self.adapter} holds {tensor}, for which the base has no weight {name}")
        return place

    def blocks(self, name: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The sum of one weight, a block of rows at a time.

        Yields:
            Rows; the sum, float64 (rows, ...); and how far a sum in float32, in any order, may be from it. A product of
            rank r errs by at most r + 2 roundings of |B| |A|, which is at most the product of the norms of B's rows and
            A's columns. The addition errs by one rounding of the sum.
        """
        base = self.base[name]
        unit = 2.0**-24  # largest relative error of one rounding to float32
        with self._open() as file:
            full = file.get_slice(self._full[name]) if name in self._full else None
            if full is not None and list(full.get_shape()) != list(base.shape):
                shapes = f"{full.get_shape()}, the base's {list(base.shape)}"
                raise MergeError(f"{self._full[name]} of {self.adapter} is {shapes}")
            factors = self._factors(file, name) if name in self._low_rank else None
            for rows in row_blocks(base):
                total = (base[rows] if full is None else full[rows].to(base.device)).double()
                slack = total.new_zeros(())
                if factors is not None:
                    left, right, scale = factors
                    total = total + scale * (left[rows] @ right)
                    norms = left[rows].norm(dim=1)[:, None] * right.norm(dim=0)[None]
                    slack = unit * ((left.shape[1] + 2) * abs(scale) * norms + total.abs())
                yield rows, total, slack

    def _factors(self, file: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        # The change of a weight as left @ right * scale: float64 (rows, rank), (rank, columns).
        base, tensors = self.base[name], self._low_rank[name]
        a, b = (file.get_tensor(tensors[kind]).to(base.device).double() for kind in sorted(tensors))
        # An embedding is looked up by rows: its change is stored transposed.
        left, right = (a.T, b.T) if "embedding_A" in tensors else (b, a)
        shape = [left.shape[0], right.shape[1]]
        if shape != list(base.shape):
            raise MergeError(f"the change of {name} in {self.adapter} is {shape}, the base's {list(base.shape)}")
        rank = a.shape[0]
        return left, right, self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def row_blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of a tensor's rows, each of at most BLOCK weights."""
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        yield slice(None)
        return
    rows = max(1, BLOCK // max(1, tensor[0].numel()))
    for first in range(0, tensor.shape[0], rows):
        yield slice(first, min(first + rows, tensor.shape[0]))


def _embedding_names(model: Any) -> tuple[str | None, str | None]:
    # Names of the head's and of the embedding's weight in the model's state.
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return names.get(id(head)), names.get(id(embedding))


def state_without_ties(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model by name, those of tied embeddings once, under the embedding's name."""
    head, _ = _embedding_names(model)
    skipped = head if model.config.tie_word_embeddings else None
    return {name: tensor for name, tensor in model.state_dict().items() if name != skipped}


class MergeError(RuntimeError):
    """A merged model is not what it should be; the message says what differs, by how much, and where."""
