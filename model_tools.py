"""Models of the pipeline: load one, mask what it should not learn, add LoRA, save, merge.

    from model_tools import InputMaskingDataCollator, load_model, resolve_precision

The code is in `arc/models/` and `arc/merging/`.
"""

from arc.merging.merge import merge_adapter, merge_and_check
from arc.models.collator import InputMaskingDataCollator
from arc.models.loading import Precision, load_model, resolve_precision
from arc.models.lora import add_lora, load_adapter, save_adapter
from arc.models.manifests import read_manifest
from arc.models.prepared_base import prepare_base
from arc.models.vocabulary import cut_tokenizer, load_tokenizer

__all__ = [
    "InputMaskingDataCollator",
    "Precision",
    "add_lora",
    "cut_tokenizer",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "merge_and_check",
    "prepare_base",
    "read_manifest",
    "resolve_precision",
    "save_adapter",
]
