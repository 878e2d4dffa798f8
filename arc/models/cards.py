"""Model cards: the README.md of a `-lora` or `-merged` folder, which says how it was made and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = "README.md"
# Settings that a card names: no paths and no times, so that the same training gives the same card anywhere.
NAMED_SETTINGS = (
    "lora_r", "lora_alpha", "use_rslora", "target_modules", "learning_rate", "embedding_learning_rate", "optim",
    "lr_scheduler_type", "warmup_ratio", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_seq_length", "seed",
)  # fmt: skip

LORA = """\
---
library_name: peft
pipeline_tag: text-generation
tags: [lora, arc]
---

# Adapter{stage}

A LoRA adapter on `{base}`, for ARC puzzles in the text format of the folder's tokenizer.

{source}

{how} Load it with peft:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER", dtype="auto")  # adapter_config.json names the base
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""

MERGED = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [arc]
---

# Model{stage}

`{base}` with an adapter merged into its weights, for ARC puzzles in the text format of the folder's tokenizer.

{source}

{how} Load it with transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def model_card(manifest: dict[str, Any]) -> str:
    """The card of an adapter, or of a merged model: Markdown that does not depend on time, machine and output folder.

    Args:
        manifest: `base`; where known `precision`, `stage`, `script` and `settings`; of a merge `merged_onto`, `dtype`.
    """
    settings, precision = manifest.get("settings", {}), manifest.get("precision") or {}
    base = str(manifest.get("base", "its base"))
    base = Path(base).name if Path(base).is_absolute() else base
    source = f"Made by `{manifest['script']}`." if "script" in manifest else "Saved outside of the stage scripts."
    values = {name: settings[name] for name in NAMED_SETTINGS if settings.get(name) is not None}
    values |= {name: " ".join(map(str, v)) for name, v in values.items() if isinstance(v, (list, tuple))}
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    if rows:
        source += "\n\n| setting | value |\n| --- | --- |\n" + "\n".join(rows)
        source += "\n\n`manifest.json` has all settings, the versions of the libraries and what it was made from."
    if "merged_onto" in manifest:
        text = MERGED
        how = f"It was merged onto the {manifest['merged_onto']} base and is stored as {manifest['dtype']}."
    else:
        text = LORA
        how = f"It was trained on the base in {'4 bits' if precision.get('load_in_4bit') else precision.get('dtype')}."
        if precision.get("load_in_4bit"):
            how += " `quantization` in `manifest.json` has the arguments of transformers' BitsAndBytesConfig."
    stage = f" of stage {manifest['stage']}" if "stage" in manifest else ""
    return text.format(stage=stage, base=base, how=how, source=source)


def write_model_card(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write the card of a folder, over the one that peft writes."""
    (Path(folder) / CARD).write_text(model_card(manifest), encoding="utf-8")
