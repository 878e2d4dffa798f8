"""LoRA: adding, saving and loading adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc.models.adapter_casts import cast_adapters_together
from arc.models.cards import write_model_card
from arc.models.folded_lora import fold_lora
from arc.models.loading import Precision, quantization_config
from arc.models.manifests import absolute_reference, apply_umask, write_manifest

if TYPE_CHECKING:
    import torch

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING_MODULES = ("embed_tokens", "lm_head")


def add_lora(
    model: Any, precision: Precision, *, target_modules: Sequence[str] = LINEAR_MODULES + EMBEDDING_MODULES,
    r: int = 512, lora_alpha: float = 24, lora_dropout: float = 0.0, use_rslora: bool = True, random_state: int = 42,
    max_seq_length: int = 2048, gradient_checkpointing: bool = True, fold: bool = False, cast_together: bool = True,
) -> Any:  # fmt: skip
    """Add LoRA to a model of `load_model`, and make embeddings trainable in full.

    `embed_tokens` and `lm_head` among the targets become full matrices, whatever `r`, as with Unsloth; a tied model has
    one matrix for both. All trainable weights are float32: in bfloat16 most updates of an embedding at a rate of 1e-5
    would round to nothing.

    Args:
        target_modules: names of linear layers, and "embed_tokens", "lm_head".
        r, lora_alpha, lora_dropout, use_rslora: see peft.LoraConfig; rsLoRA scales by alpha / sqrt(r).
        random_state: seed of the initial values.
        max_seq_length: the longest row in tokens.
        gradient_checkpointing: see `set_gradient_checkpointing`.
        fold: add LoRA's matrices to the weights before they multiply, see folded_lora.
        cast_together: on the Unsloth engine, share one cast of all adapters, see adapter_casts.

    Returns:
        A peft model.

    Raises:
        ValueError: layers that cannot be folded.
    """
    import torch

    lora = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "bias": "none", "use_rslora": use_rslora}
    if precision.engine == "unsloth":
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            model, target_modules=list(target_modules), use_gradient_checkpointing=gradient_checkpointing,
            random_state=random_state, max_seq_length=max_seq_length, loftq_config=None, **lora,
        )  # fmt: skip
    else:
        from peft import LoraConfig, get_peft_model

        full = [name for name in EMBEDDING_MODULES if name in target_modules]
        tied = bool(model.config.tie_word_embeddings and full)
        torch.manual_seed(random_state)
        config = LoraConfig(
            target_modules=[name for name in target_modules if name not in EMBEDDING_MODULES],
            modules_to_save=(["embed_tokens"] if tied else full) or None,
            ensure_weight_tying=tied,
            task_type="CAUSAL_LM",
            **lora,
        )
        model = get_peft_model(model, config)
    train_in_float32(model)
    if precision.engine == "transformers":
        _match_embedding_dtypes(model, precision.torch_dtype)
    elif cast_together:
        cast_adapters_together(model, precision.torch_dtype)
    if fold:
        fold_lora(model)
    return model


def train_in_float32(model: Any) -> None:
    """Make every trainable weight float32, in place, keeping tied ones tied."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _match_embedding_dtypes(model: Any, dtype: torch.dtype) -> None:
    # The embeddings are float32, the layers 16-bit: round the embedding's output, widen the head's input.
    import torch

    if dtype == torch.float32:
        return

    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
    head = model.get_output_embeddings()
    head = getattr(head, "modules_to_save", {"default": head})["default"]
    head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))


def set_gradient_checkpointing(model: Any, engine: str, on: bool) -> None:
    """Turn gradient checkpointing on or off: on, the backward pass computes activations again, which saves memory."""
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        model._unsloth_gradient_checkpointing = on  # Unsloth's switch for the training after a decoding
        FastLanguageModel.for_training(model, use_gradient_checkpointing=on)
    elif on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def save_adapter(
    model: Any, tokenizer: Any, path: str | Path, *, base: str | Path, precision: Precision,
    manifest: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Save adapter, tokenizer, manifest and model card into an existing folder.

    Args:
        base: the folder that the adapter was trained on; adapter_config.json names it, so that plain peft finds it.
        precision: how the training loaded the base; a merge onto the quantised base repeats it.
        manifest: further entries.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = absolute_reference(base)
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # a set's order differs from process to process
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)  # how it was loaded, which saving would write down
    # modules_to_save names the embeddings already; "auto" would guess from the base's vocabulary whether to save them.
    model.save_pretrained(str(path), save_embedding_layers=False)
    tokenizer.save_pretrained(str(path))
    manifest = {**(manifest or {}), "base": absolute_reference(base), "precision": asdict(precision)}
    if precision.load_in_4bit:
        # For loading without this pipeline: transformers.BitsAndBytesConfig(**quantization).
        recorded = quantization_config(precision).to_dict()
        manifest["quantization"] = {n: recorded[n] for n in recorded if n.startswith(("load_in_4", "bnb_4"))}
    write_manifest(path, manifest)
    write_model_card(path, manifest)
    apply_umask(path)


def load_adapter(model: Any, path: str | Path) -> Any:
    """Put a saved adapter, for use without further training, onto a base that `load_model` loaded, with any engine.

    Raises:
        ValueError: no adapter, or its matrices do not fit the base (another size or vocabulary).
    """
    from peft import PeftModel

    if not (Path(path) / "adapter_model.safetensors").is_file():  # peft would look for a pickle instead
        raise ValueError(f"{path} has no adapter_model.safetensors: expected the folder of an adapter")
    try:
        # Read on the CPU: beside a float32 model a card of 8 GB has no room for a second copy of the embeddings.
        return PeftModel.from_pretrained(model, str(path), is_trainable=False, torch_device="cpu")
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the adapter {path} was trained on another base: {reason}") from None
