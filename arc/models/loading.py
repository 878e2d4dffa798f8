"""Loading a model, in the number formats and with the engine of the run, and switching it to decoding.

Heavy libraries are imported inside functions: so `--help` is quick, and Unsloth comes before the libraries it patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc.models.library_patches import keep_4bit_layout, uncompiled_layers
from arc.models.vocabulary import load_tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """How the training loads its base; the merge repeats it."""

    engine: str  # "unsloth" or "transformers"
    dtype: str  # "bfloat16", "float16" or "float32": of the frozen weights and of the arithmetic
    load_in_4bit: bool  # the frozen linear layers are quantised to 4-bit NormalFloat, with nested scales

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a type of torch."""
        import torch

        return getattr(torch, self.dtype)


def resolve_precision(engine: str = "auto", dtype: str = "auto", load_in_4bit: bool | None = None) -> Precision:
    """Choose engine and number formats for this machine.

    `auto` is Unsloth in 4 bits with CUDA, else transformers. The type is bfloat16 on cards that have it, float16 on
    others (such as a T4), and float32 on a CPU.

    Raises:
        ValueError: Unsloth was asked for and cannot run here.
    """
    import importlib.util

    import torch

    cuda = torch.cuda.is_available()
    has_unsloth = importlib.util.find_spec("unsloth") is not None
    if engine == "auto":
        engine = "unsloth" if cuda else "transformers"
    if engine == "unsloth" and not (cuda and has_unsloth):
        why = "no CUDA device is seen" if not cuda else "it is not installed (pip install -r requirements.txt)"
        raise ValueError(f"--engine unsloth cannot run here: {why}; use --engine transformers")
    if dtype == "auto" and not cuda:
        dtype = "float32"
    elif dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if engine == "unsloth" and dtype == "float32":
        raise ValueError("--engine unsloth trains in bfloat16 or float16, not float32")
    return Precision(engine, dtype, engine == "unsloth" if load_in_4bit is None else load_in_4bit)


def quantization_config(precision: Precision) -> Any:
    """The 4-bit settings of the published recipe and of Unsloth: NF4, nested scales, 16-bit arithmetic."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.torch_dtype,
    )  # fmt: skip


def several_processes() -> bool:
    """Whether a launcher started more than one process and they have joined."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def load_model(path: str | Path, precision: Precision, max_seq_length: int = 2048) -> tuple[Any, Any]:
    """Load a 16-bit model folder for training or decoding, quantised if `precision` says so.

    Args:
        path: a `-prepared` or `-merged` folder.
        max_seq_length: the longest row in tokens (Unsloth sizes its tables by it).

    Returns:
        The model, on the first CUDA device if there is one, and the folder's tokenizer.
    """
    import torch

    tokenizer = load_tokenizer(path)
    options: dict[str, Any] = {"dtype": precision.torch_dtype, "trust_remote_code": False}
    if precision.engine == "unsloth":
        from unsloth import FastLanguageModel

        if several_processes():
            options["device_map"] = {"": torch.cuda.current_device()}
        options |= {"max_seq_length": max_seq_length, "load_in_4bit": precision.load_in_4bit}
        model, _ = FastLanguageModel.from_pretrained(model_name=str(path), **options)
    else:
        from transformers import AutoModelForCausalLM

        if precision.load_in_4bit:
            options["quantization_config"] = quantization_config(precision)
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"  # each process has its GPU
        options |= {"device_map": {"": device}, "use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(str(path), **options)
        keep_4bit_layout(model)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@contextlib.contextmanager
def decoding(model: Any, engine: str) -> Iterator[Any]:
    """Switch a model in training to decoding and back: evaluation mode, no checkpointing, no compiled layers.

    Attention by cuDNN, which PyTorch prefers on Hopper GPUs, is off: it makes a plan for each length of a reply.
    """
    import torch

    was_training = model.training
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    else:
        model.eval()
    checkpointed = engine == "transformers" and getattr(model, "is_gradient_checkpointing", False)
    if checkpointed:
        model.gradient_checkpointing_disable()
    by_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.no_grad(), uncompiled_layers(model):
            yield model
    finally:
        torch.backends.cuda.enable_cudnn_sdp(by_cudnn)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if was_training:
            if engine == "unsloth":
                FastLanguageModel.for_training(model)
            else:
                model.train()
