"""Whether the files of a folder make a model or an adapter that can be loaded. The weights themselves are not read."""

from __future__ import annotations

import json
from pathlib import Path


def find_model_problem(folder: Path, kind: str = "model") -> str | None:
    """Why a folder cannot be loaded as a model or an adapter, in words; None if it can.

    Reads the configuration, the tokenizer and the headers of the weights. Every tensor of the configured model must be
    present and have the right shape.

    Args:
        folder: of the model.
        kind: "model" or "adapter".
    """
    config = "adapter_config.json" if kind == "adapter" else "config.json"
    if not (folder / config).is_file():
        other = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
        return f"it holds no {config}" + (f" but a {other[0]}: that is no {kind}" if other else "")
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return f"{path.name} is not JSON"
        if path.name == "adapter_config.json" and (not isinstance(content, dict) or content.get("peft_type") != "LORA"):
            return f"{path.name} is of no LoRA adapter"
    shapes = _stored_shapes(folder, "adapter_model" if kind == "adapter" else "model")
    if isinstance(shapes, str):
        return shapes
    if kind == "adapter":
        return _incomplete_pair(shapes)
    if not (folder / "tokenizer.json").is_file():
        return "it holds no tokenizer.json (a fast tokenizer)"
    return _compare_with_config(folder, shapes)


def _incomplete_pair(shapes: dict[str, tuple[int, ...]]) -> str | None:
    # LoRA's matrices come in pairs.
    if not shapes:
        return "adapter_model.safetensors is empty"
    for name in shapes:
        for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if f".{one}." in name and name.replace(f".{one}.", f".{other}.") not in shapes:
                return f"adapter_model.safetensors lacks {name.replace(one, other)}"
    return None


def _stored_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]] | str:
    # Names and shapes of all tensors from the headers of the files, or what is wrong with those.
    from safetensors import SafetensorError, safe_open

    index = folder / f"{name}.safetensors.index.json"
    files = [f"{name}.safetensors"]
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"{index.name} is no index of weights"
    shapes = {}
    for file in files:
        if not (folder / file).is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
            also = f" ({pickles[0]} is a pickle, which can run code: never loaded)" if pickles else ""
            return f"it holds no {file}{also}"
        try:
            with safe_open(folder / file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            return f"{file} cannot be read ({str(error).splitlines()[0]})"
    return shapes


def _compare_with_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a bad configuration makes transformers raise
        return f"config.json is of no model that can be loaded ({(str(error).strip() or repr(error)).splitlines()[0]})"
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # shared with the embedding, stored once
        stored = shapes.get(name)
        if stored is None:
            return f"its weights lack {name}"
        if stored != tuple(tensor.shape):
            return f"{name} is of shape {list(stored)}, config.json asks for {list(tensor.shape)}"
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception for whatever is wrong with a file
        return f"tokenizer.json cannot be read ({str(error).splitlines()[0]})"
    highest, rows = max(tokenizer.get_vocab().values(), default=-1), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        return f"its tokenizer has ids up to {highest}, its embedding {rows} rows: they are not of one model"
    return None
