"""Weights of a base plus its adapter, computed one tensor at a time from the files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


ADAPTER_WEIGHTS = "adapter_model.safetensors"
BLOCK = 2**22  # weights that are compared at once


def saved_dtype(folder: str | Path) -> torch.dtype:
    """The 16-bit type that a model folder is stored in (bfloat16 for one stored in float32)."""
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


class AdapterSum:
    """Base + adapter in float64, weight by weight: read from the adapter's files without peft.

    The model's state names the weights; of tied ones, the embedding stands for both.
    """

    def __init__(self, model: Any, adapter: str | Path):
        """See the class.

        Raises:
            MergeError: the adapter holds what has no place in the model, or what this reading does not know.
        """
        self.adapter = Path(adapter)
        self.config = json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        self.base = state_without_ties(model)
        self._head, self._embedding = _embedding_names(model)
        self._tied = bool(model.config.tie_word_embeddings)
        self._low_rank: dict[str, dict[str, str]] = {}  # weight -> part -> tensor of the adapter
        self._added: dict[str, str] = {}  # bias -> tensor of the adapter that is added, scaled
        self._full: dict[str, str] = {}  # weight -> tensor of the adapter that replaces it
        self._refuse_unknown()
        self._sort_tensors()

    def _refuse_unknown(self) -> None:
        config = self.config
        known = ("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "alpha_pattern", "layer_replication")
        known += ("trainable_token_indices", "target_parameters", "alora_invocation_tokens")
        used = [name for name in known if config.get(name)]
        if config.get("peft_type") != "LORA" or used:
            what = ", ".join(used) or config.get("peft_type")
            raise MergeError(f"{self.adapter} uses {what}, which this check cannot add up: expected plain LoRA")

    def _sort_tensors(self) -> None:
        from safetensors import safe_open

        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:
            names = list(file.keys())
        for tensor in names:
            name = tensor.removeprefix("base_model.model.")
            module, _, rest = name.partition(".lora_")
            if rest in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
                self._low_rank.setdefault(self._place(f"{module}.weight", tensor), {})[rest] = tensor
            elif rest == "B.bias":
                self._added[self._place(f"{module}.bias", tensor)] = tensor
            else:
                name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
                other = self._full.setdefault(self._place(name, tensor), tensor)
                if not self._are_equal(other, tensor):
                    raise MergeError(f"{self.adapter} holds two matrices, {other} and {tensor}, for one tied one")
        tied = {self._embedding, self._head} if self._tied else set()
        if tied & set(self._low_rank):
            raise MergeError(
                f"{self.adapter} has a low-rank change of one of two tied matrices ({self._embedding}): a tied model "
                "cannot hold the sum; untie the base before training, or train the matrix in full"
            )
        incomplete = [name for name, parts in self._low_rank.items() if len(parts) != 2]
        if incomplete:
            raise MergeError(f"{self.adapter} has half of a low-rank change only for {incomplete[0]}")

    def _are_equal(self, one: str, other: str) -> bool:
        import torch
        from safetensors import safe_open

        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:
            return one == other or torch.equal(file.get_tensor(one), file.get_tensor(other))

    def _place(self, name: str, tensor: str) -> str:
        # A tied model has one matrix for both names.
        name = self._embedding if self._tied and name == self._head else name
        if name not in self.base:
            raise MergeError(f"{self.adapter} holds {tensor}, for which the base has no weight {name}")
        return name

    def scale(self, rank: int) -> float:
        """What a low-rank product is multiplied with: alpha / sqrt(rank) (rsLoRA) or alpha / rank."""
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def blocks(self, name: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The sum of one weight, a block of rows at a time.

        Yields:
            Rows; the sum, float64 (rows, ...); and how far a sum in float32, in whatever order, may be from it: a
            product of rank r errs by at most r + 2 roundings of |B| |A| (here: of the product of the norms of B's rows
            and A's columns, which is no less), the addition by one of the sum.
        """
        from safetensors import safe_open

        base = self.base[name]
        unit = 2.0**-24  # largest relative error of one rounding to float32
        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:

            def load(tensor: str) -> torch.Tensor:
                return file.get_tensor(tensor).to(base.device).double()

            left = right = full = None
            scale = 1.0
            if name in self._full:
                full = file.get_slice(self._full[name])
                if list(full.get_shape()) != list(base.shape):
                    raise MergeError(
                        f"{self._full[name]} of {self.adapter} is {full.get_shape()}, the base's {list(base.shape)}"
                    )
            if name in self._low_rank:
                parts = self._low_rank[name]
                a, b = (load(parts[part]) for part in sorted(parts))
                scale = self.scale(a.shape[0])
                # An embedding is looked up by rows: its change is stored the other way round.
                left, right = (a.T, b.T) if "embedding_A" in parts else (b, a)
                if (left.shape[0], right.shape[1]) != tuple(base.shape):
                    raise MergeError(
                        f"the change of {name} in {self.adapter} is {[left.shape[0], right.shape[1]]}, the base's "
                        f"{list(base.shape)}"
                    )
            added = load(self._added[name]) * self.scale(self._rank_of(name)) if name in self._added else None
            for rows in row_blocks(base):
                whole = base[rows] if full is None else full[rows].to(base.device)
                total = whole.double()
                slack = total.new_zeros(())
                if left is not None:
                    total = total + scale * (left[rows] @ right)
                    norms = left[rows].norm(dim=1)[:, None] * right.norm(dim=0)[None]
                    slack = unit * ((left.shape[1] + 2) * abs(scale) * norms + total.abs())
                elif added is not None:
                    total = total + added[rows]
                    slack = 4 * unit * (total.abs() + added[rows].abs())
                yield rows, total, slack

    def _rank_of(self, bias: str) -> int:
        from safetensors import safe_open

        parts = self._low_rank[bias.removesuffix(".bias") + ".weight"]
        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:
            return int(file.get_slice(parts["A.weight"]).get_shape()[0])


def row_blocks(tensor: torch.Tensor) -> Iterator[slice]:
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        yield slice(None)
        return
    rows = max(1, BLOCK // max(1, tensor[0].numel()))
    for first in range(0, tensor.shape[0], rows):
        yield slice(first, min(first + rows, tensor.shape[0]))


def _embedding_names(model: Any) -> tuple[str | None, str | None]:
    # Names of the head's and of the embedding's weight in the model's state.
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return tuple(f"{names[id(module)]}.weight" if id(module) in names else None for module in (head, embedding))


def state_without_ties(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model by name, those of tied embeddings once, under the embedding's name."""
    head, _ = _embedding_names(model)
    skipped = head if model.config.tie_word_embeddings else None
    return {name: tensor for name, tensor in model.state_dict().items() if name != skipped}


class MergeError(RuntimeError):
    """A merged model is not what it should be; the message says what differs, by how much, and where."""
