"""Models of the pipeline: load one, mask what it should not learn, add LoRA, save, merge.

    from model_tools import InputMaskingDataCollator, load_model, resolve_precision

    model, tokenizer = load_model("output/Llama-3.2-1B-Base-merged", resolve_precision())

The code is in `arc/models/` and `arc/merging/`. torch is imported when a function needs it.
"""

from arc.merging.merge import merge_adapter, merge_and_check
from arc.models.collator import InputMaskingDataCollator
from arc.models.loading import Precision, decoding, load_model, resolve_precision
from arc.models.lora import (
    EMBEDDING_MODULES,
    LINEAR_MODULES,
    add_lora,
    load_adapter,
    save_adapter,
    set_gradient_checkpointing,
)
from arc.models.manifests import read_manifest, write_manifest
from arc.models.prepared_base import check_base, prepare_base
from arc.models.vocabulary import KEPT_CHARACTERS, cut_tokenizer, load_tokenizer

__all__ = [
    "EMBEDDING_MODULES", "KEPT_CHARACTERS", "LINEAR_MODULES", "InputMaskingDataCollator", "Precision", "add_lora",
    "check_base", "cut_tokenizer", "decoding", "load_adapter", "load_model", "load_tokenizer", "merge_adapter",
    "merge_and_check", "prepare_base", "read_manifest", "resolve_precision", "save_adapter",
    "set_gradient_checkpointing", "write_manifest",
]  # fmt: skip
