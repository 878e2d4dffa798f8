"""The models to evaluate: folders of models and adapters, and hub names, checked before one is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arc.models.loading import Precision, load_model, resolve_precision
from arc.models.lora import load_adapter
from arc.models.manifests import read_manifest
from arc.models.prepared_base import check_base
from arc.runs.artifacts import find_damage, fingerprint

LONGEST_NAME = 180  # bytes of a model's name: it becomes part of a file's name, which may have 255
# Names in an entry of results.json that no model may have.
RESERVED = ("puzzle", "train", "input", "solution", "leaked", "seen_test")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate."""

    name: str  # of its column
    path: str  # folder or hub name of the model, or of an adapter's base
    adapter: Path | None  # folder of the adapter; None: the model has none
    precision: Precision  # for loading
    identity: str  # hash of contents and precision; the cache's entries carry it


def find_models(
    models: Sequence[str], names: Sequence[str] = (), dtype: str = "auto", load_in_4bit: bool | None = None
) -> list[EvaluatedModel]:
    """Check the models without loading them.

    Args:
        models: folders of models or adapters, or hub names. An adapter_config names the adapter's base.
        names: of the columns; none: the folders' names, longer where two are equal.
        dtype: bfloat16, float16, float32, or auto: this machine's.
        load_in_4bit: quantise; None: adapters as they were trained, models not.

    Raises:
        ValueError, OSError: a model is missing or damaged, or names are too few, too many, equal or not allowed.
    """
    if names and len(names) != len(models):
        raise ValueError(f"--model_names: found {len(names)} names for {len(models)} models")
    columns = list(names) or _names_of(models)
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"two models are called {twice[0]}: tell them apart with --model_names")
    for name in columns:
        too_long = len(name.encode("utf-8", "replace")) > LONGEST_NAME
        if name in RESERVED or not name.strip() or "/" in name or not name.isprintable() or too_long:
            raise ValueError(f"a model is called {name!r}: name it otherwise with --model_names")
    return [_find_model(path, name, dtype, load_in_4bit) for path, name in zip(models, columns, strict=True)]


def _names_of(models: Sequence[str]) -> list[str]:
    # The last folder of each path, and as many before it as it takes to make the names differ.
    paths = [(Path(model).resolve() if Path(model).is_dir() else Path(model)).parts for model in models]
    depth = [1] * len(paths)
    while True:
        names = ["-".join(path[-count:]).replace("/", "") for path, count in zip(paths, depth, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(paths[i])]
        if not alike:
            return names
        for i in alike:
            depth[i] += 1


def _find_model(path: str, name: str, dtype: str, load_in_4bit: bool | None) -> EvaluatedModel:
    folder, adapter, trained = Path(path), None, {}
    if not folder.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/")):
            raise FileNotFoundError(f"{path} is not there: expected a folder, or a hub name (OWNER/NAME)")
        marks = [_hub_mark(path)]
    else:
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            adapter = folder
        if damage := find_damage(folder, "adapter" if adapter else "model"):
            raise ValueError(f"{folder} cannot be evaluated: {damage}")
        path, marks = str(folder), [fingerprint(folder)]
    if adapter:
        path, trained = _base_of(adapter), read_manifest(adapter).get("precision", {})
        marks.append(fingerprint(path) if Path(path).is_dir() else _hub_mark(path))
    in_4bit = bool(trained.get("load_in_4bit", False)) if load_in_4bit is None else load_in_4bit
    precision = resolve_precision("transformers", dtype, in_4bit)
    marks += [precision.dtype, "4-bit" if in_4bit else "whole"]
    return EvaluatedModel(name, path, adapter, precision, hashlib.sha256("\n".join(marks).encode()).hexdigest())


def _hub_mark(name: str) -> str:
    # The name and, if the hub or the downloaded files tell it, the revision.
    return f"{fingerprint(name)} {getattr(check_base(name), '_commit_hash', None)}"


def _base_of(adapter: Path) -> str:
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} does not say which model it goes onto: its adapter_config.json names no base")
    if Path(base).is_dir():
        if damage := find_damage(Path(base)):
            raise ValueError(f"{adapter} goes onto {base}, which is damaged: {damage}")
    elif Path(base).is_absolute():
        raise FileNotFoundError(f"{adapter} goes onto {base}, which is not there: bring it back")
    return base


def load_evaluated(model: EvaluatedModel, max_seq_length: int) -> Any:
    """Load a model, with its adapter if it has one, onto this machine's device."""
    loaded, _ = load_model(model.path, model.precision, max_seq_length)
    return loaded if model.adapter is None else load_adapter(loaded, model.adapter)


def default_batch_size(model: Any, tokens: int) -> int:
    """Rows to decode at once: as many as a third of the free CUDA memory holds, 1 to 256; 32 on a CPU.

    The model's config gives the size of the KV cache; `tokens` is the length of the longest row.
    """
    import torch

    if not torch.cuda.is_available():
        return 32
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * heads * size * torch.empty(0, dtype=model.dtype).element_size() * tokens
    return int(min(256, max(1, torch.cuda.mem_get_info()[0] // 3 // row_bytes)))


def tokenizer_folder(model: EvaluatedModel) -> str | Path:
    """Folder of the model's tokenizer: the stages save one with each adapter, other programs may not."""
    if model.adapter is not None and (model.adapter / "tokenizer.json").is_file():
        return model.adapter
    return model.path


def longest_context(path: str) -> int | None:
    """The largest number of tokens that a model takes; None: no limit."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "max_position_embeddings", None)
