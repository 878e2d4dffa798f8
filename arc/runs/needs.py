"""Memory and disk that a run needs, compared with what is free."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def format_duration(seconds: float) -> str:
    """Seconds as "1 h 02 min", "3 min 20 s" or "12 s"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s" if seconds >= 60 else f"{seconds:.0f} s"


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights of a model and of its LoRA.

    Attributes:
        linear: linear layers without the head; these are quantised in 4 bits.
        embeddings: embed_tokens and lm_head, counted once if they are tied.
        other: norms and the like.
        lora: LoRA matrices.
        full_embeddings, full_head: embed_tokens and lm_head if they are trained in full, else 0.
        saved: weights in an adapter's file: the trained ones, and peft's second copy of a tied matrix.
        rank: of LoRA, for messages.
    """

    linear: int
    embeddings: int
    other: int
    lora: int
    full_embeddings: int
    full_head: int
    saved: int
    rank: int

    @property
    def model(self) -> int:
        """All weights of the model without LoRA."""
        return self.linear + self.embeddings + self.other

    @property
    def trained(self) -> int:
        """All trainable weights."""
        return self.lora + self.full_embeddings + self.full_head


@dataclass(frozen=True)
class Need:
    """The least number of bytes that some work needs.

    Attributes:
        doing: the work: "training", "merging", "writing".
        kind: "memory" or "disk".
        parts: bytes by purpose.
        remedies: ways to need less, best first.
    """

    doing: str
    kind: str
    parts: dict[str, int]
    remedies: tuple[str, ...]

    @property
    def total(self) -> int:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Free:
    """Bytes that are free.

    Attributes:
        disk: on the file system of the output folder.
        memory: on the device of the model.
        place: the output folder or its nearest existing parent, for messages.
        memory_name: "GPU memory" or "main memory".
    """

    disk: int
    memory: int
    place: str
    memory_name: str


def count_weights(config: Any, *, target_modules: Sequence[str], r: int, vocabulary: int | None = None) -> WeightCounts:
    """Count the weights of a transformers configuration, without allocating them.

    Args:
        config: of the base model.
        target_modules: see `lora.add_lora`. embed_tokens and lm_head are trained in full, as one matrix if tied.
        r: rank of LoRA.
        vocabulary: tokens of the prepared base; default: those of the configuration.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if vocabulary is not None:
        config.vocab_size = vocabulary
        # Token numbers above the cut vocabulary mean nothing here, and an embedding refuses such a padding number.
        config.pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding is head
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not head
    }
    linear = sum(module.weight.numel() for module in layers.values())
    embeddings = embedding.numel() + (0 if tied else head.numel())
    total = sum(parameter.numel() for parameter in model.parameters())
    targets = [module for name, module in layers.items() if name.rpartition(".")[2] in target_modules]
    lora = sum(r * (module.in_features + module.out_features) for module in targets)
    full = {"embed_tokens", "lm_head"} & set(target_modules)
    full_embeddings = embedding.numel() if "embed_tokens" in full or (tied and full) else 0
    full_head = head.numel() if "lm_head" in full and not tied else 0
    return WeightCounts(
        linear=linear,
        embeddings=embeddings,
        other=total - linear - embeddings,
        lora=lora,
        full_embeddings=full_embeddings,
        full_head=full_head,
        saved=lora + full_head + full_embeddings * (2 if tied else 1),
        rank=r,
    )


def optimizer_bytes(counts: WeightCounts, optim: str) -> int:
    """Bytes of an optimizer's state. The 8-bit optimizers of bitsandbytes keep the state of embeddings in 32 bits."""
    if optim == "muon":  # one of LoRA's matrices, Adam's two of the rest
        return 4 * (counts.trained + counts.full_embeddings + counts.full_head)
    states = 1 if "lion" in optim else 2 if "adam" in optim or "ademamix" in optim else 0
    if "8bit" in optim or "bnb" in optim:
        # One byte a weight and state, with a float32 scale for each block of 256.
        scaled = (counts.lora + counts.full_head) * (1 + 4 / 256)
        return math.ceil(states * (scaled + 4 * counts.full_embeddings))
    return states * 4 * counts.trained


def disk_needs(
    counts: WeightCounts,
    *,
    optim: str,
    checkpoints: int,
    checkpoints_there: int = 0,
    best: int = 0,
    adapter: bool = True,
    merged: bool = True,
    prepared: bool = False,
    tokenizer_bytes: int = 0,
) -> Need:
    """Bytes that a stage will write.

    Args:
        counts: of its model.
        optim: the optimizer, by transformers' name.
        checkpoints: limit of checkpoints (`save_total_limit`), 0 for none. While one is written there is one more.
        checkpoints_there: complete checkpoints that exist already.
        best: copies of the trained weights that stage 3 still has to write beside the checkpoints (grpo/guard.py).
        adapter, merged, prepared: whether the adapter, the merged model and the prepared base are still to be written.
        tokenizer_bytes: of the tokenizer in each folder.
    """
    one = 4 * counts.saved + tokenizer_bytes  # float32, as trained
    model = 2 * counts.model + tokenizer_bytes
    more = max(1, checkpoints + 1 - checkpoints_there) if checkpoints and adapter else 0
    parts = {
        "prepared base": model if prepared else 0,
        f"{more} checkpoint{'s' if more != 1 else ''}": more * (one + optimizer_bytes(counts, optim)),
        "best adapters": best * 4 * counts.trained if checkpoints and adapter else 0,
        "adapter": one if adapter else 0,
        "merged model": model if merged else 0,
    }
    remedies = ["make room, or another --output_dir"]
    if checkpoints > 1:
        remedies.append(f"--save_total_limit 1 (now {checkpoints})")
    if more:
        remedies.append("--save_steps 0: no checkpoints, a killed run starts anew")
    remedies.append(f"a lower --lora_r (now {counts.rank})")
    return Need("writing", "disk", {name: size for name, size in parts.items() if size}, tuple(remedies))


def memory_needs(
    counts: WeightCounts,
    *,
    engine: str,
    dtype: str,
    load_in_4bit: bool,
    optim: str,
    training: bool = True,
    merging: bool = True,
    processes: int = 1,
) -> list[Need]:
    """The least memory of training and merging in bytes: weights, gradients and optimizer, without activations.

    Args:
        counts: of the model.
        engine, dtype, load_in_4bit: see `loading.Precision`.
        optim: the optimizer, by transformers' name.
        training, merging: whether each is still to be done.
        processes: that train together, each with a whole model; the bytes are those of one process.
    """
    width = 4 if dtype == "float32" else 2
    # NF4: half a byte, and for each block of 64 a one-byte scale, which itself has a float32 scale for 256 of them.
    linear = counts.linear * (0.5 + 1 / 64 + 4 / (64 * 256)) if load_in_4bit else counts.linear * width
    # peft keeps the original beside a matrix that is trained in full; Unsloth moves it out of the way.
    frozen = counts.embeddings - (counts.full_embeddings + counts.full_head if engine == "unsloth" else 0)
    needs = []
    if training:
        parts = {
            "frozen weights": math.ceil(linear + (frozen + counts.other) * width),
            "trained weights": 4 * counts.trained,
            "their gradients": 4 * counts.trained,
            "what processes exchange": 4 * counts.trained if processes > 1 else 0,  # a copy of the gradients
            # A paged optimizer's state may be in main memory.
            "optimizer": 0 if "paged" in optim else optimizer_bytes(counts, optim),
        }
        remedies = [] if load_in_4bit else ["--load_in_4bit true"]
        if "8bit" not in optim:
            remedies.append(f"--optim adamw_8bit (now {optim})")
        remedies.append(f"a lower --lora_r (now {counts.rank})")
        if counts.full_embeddings or counts.full_head:
            remedies.append("--target_modules without embed_tokens and lm_head")
        needs.append(Need("training", "memory", parts, tuple(remedies)))
    if merging:
        parts = {"weights in float32": 4 * counts.model, "adapter": 4 * counts.trained}
        needs.append(Need("merging", "memory", parts, ("end what else uses the memory", "another machine")))
    return needs


def read_free(folder: str | Path) -> Free:
    """Free bytes on the file system of a folder, which need not exist yet, and on the device for the model."""
    import torch

    place = nearest_existing(Path(folder))
    disk = shutil.disk_usage(place).free
    if torch.cuda.is_available():
        return Free(disk, torch.cuda.mem_get_info()[0], str(place), "GPU memory")
    import psutil

    return Free(disk, psutil.virtual_memory().available, str(place), "main memory")


def nearest_existing(path: Path) -> Path:
    """The path itself if it exists, else the nearest of its parents that does."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def find_shortages(needs: Sequence[Need], free: Free) -> list[str]:
    """One line with figures for each need that is larger than what is free; empty if there is none."""
    lines = []
    for need in needs:
        there = free.disk if need.kind == "disk" else free.memory
        if need.total <= there:
            continue
        what = f"of {free.memory_name}" if need.kind == "memory" else f"on the disk of {free.place}"
        parts = ", ".join(f"{name} {in_units(size)}" for name, size in need.parts.items() if size)
        lines.append(
            f"{need.doing} needs at least {in_units(need.total)} {what} ({parts}), {in_units(there)} are free; what "
            f"helps, best first: {'; '.join(need.remedies)}"
        )
    return lines


def in_units(size: float) -> str:
    """A size in bytes as text, in KiB, MiB or GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= 0.1 * scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"
