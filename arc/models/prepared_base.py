"""The prepared base: a model folder whose vocabulary is cut to what the text format needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arc.models.manifests import apply_umask
from arc.models.vocabulary import cut_tokenizer, load_tokenizer


def config_token_ids(config: Any) -> list[int]:
    """All token ids that a model or generation configuration names (bos, eos, pad, ...)."""
    values = [value for name, value in config.to_dict().items() if name.endswith("token_id") and value is not None]
    return [i for value in values for i in (value if isinstance(value, list) else [value])]


def prepare_base(base_model: str | Path, out: str | Path, full_vocab: bool = False) -> dict[str, Any]:
    """Write the base that training starts from: 16-bit weights, a pad token, the vocabulary cut to what ARC needs.

    Tokens keep their embeddings, so their logits are those of the original model.

    Args:
        base_model: folder or hub name of an unquantised model.
        out: an existing folder.

    Returns:
        For the manifest: the base's name, the sizes of the vocabulary before and after.

    Raises:
        ValueError: the base is quantised already, or its vocabulary cannot be cut.
        FileNotFoundError: no such model, or no access to it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_base(base_model)
    tokenizer = load_tokenizer(base_model)
    options = {"dtype": "auto", "trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(str(base_model), **options)
    if model.dtype == torch.float32:
        model = model.to(torch.bfloat16)
    before = len(tokenizer)
    # A base may name some of its special tokens only in its configurations.
    named = config_token_ids(model.config) + config_token_ids(model.generation_config)
    if not full_vocab:
        tokenizer, old_ids = cut_tokenizer(tokenizer, named)
        cut_embeddings(model, old_ids)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    # Without the chat model's settings for sampling.
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    model.generation_config.do_sample = False
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    apply_umask(out)
    return {"base_model": str(base_model), "vocabulary_before": before, "vocabulary": len(tokenizer)}


def cut_embeddings(model: Any, old_ids: Sequence[int]) -> None:
    """Keep the embedding rows `old_ids`, in this order, and renumber the ids of the configurations, in place."""
    import torch

    new_id = {old: new for new, old in enumerate(old_ids)}
    rows = torch.as_tensor(list(old_ids))
    with torch.no_grad():
        inputs = model.get_input_embeddings().weight[rows].clone()
        outputs = model.get_output_embeddings().weight[rows].clone()
        model.resize_token_embeddings(len(old_ids))
        model.get_input_embeddings().weight.copy_(inputs)
        model.get_output_embeddings().weight.copy_(outputs)
    for config in (model.config, model.generation_config):
        for name, value in config.to_dict().items():
            if name.endswith("token_id") and value is not None:
                setattr(config, name, [new_id[i] for i in value] if isinstance(value, list) else new_id[value])


def check_base(base_model: str | Path) -> Any:
    """The configuration of a base model.

    Raises:
        ValueError: no model, or a quantised one: cutting, LoRA and merging need the 16-bit weights.
        FileNotFoundError: no such model, or no access to it.
    """
    from transformers import AutoConfig

    folder = Path(base_model) if Path(base_model).is_dir() else None
    if folder is not None and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} is an adapter, not a model: name the -merged folder beside it")
        raise ValueError(f"{folder} holds no config.json: expected the folder of a model")
    try:
        config = AutoConfig.from_pretrained(str(base_model), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a bad configuration makes transformers raise
        if folder is not None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise ValueError(f"{folder / 'config.json'} is of no model that can be loaded ({reason})") from None
        if not isinstance(error, (OSError, ValueError)):
            raise
        gated = "gated" in str(error).lower() or "401" in str(error) or "403" in str(error)
        reason = "it is gated" if gated else "no such folder, and the hub does not give it"
        raise FileNotFoundError(
            f"cannot load the model {base_model}: {reason} ({str(error).strip().splitlines()[0][:120]}). Accept its "
            "licence on huggingface.co and run `hf auth login`, or name a local folder or an ungated 16-bit copy: "
            "--base_model FOLDER"
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        name = str(base_model)
        for suffix in ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit", "-4bit", "-8bit"):
            name = name.removesuffix(suffix)
        instead = name if name != str(base_model) else "the 16-bit model that it was made from"
        raise ValueError(
            f"{base_model} is quantised already; training quantises by itself. Name its 16-bit original: "
            f"--base_model {instead}"
        )
    return config
