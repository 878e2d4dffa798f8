"""Write docs/settings.md from the settings of the scripts.

python docs/make_settings.py          # after a setting has changed
python docs/make_settings.py --check  # exit code 1 if the page is not current
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import base_finetune  # noqa: E402 - found only now
import base_finetune_final  # noqa: E402
import evaluate_arc  # noqa: E402
import train_grpo  # noqa: E402
from arc.runs.settings import DataSettings, RunSettings, SupervisedSettings  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

This page is made from the code: `python docs/make_settings.py`. Every setting is a flag (`--learning_rate 1e-4`), or a
line of a YAML file that `--config` names. Flags win over the file. `--help` of a script shows the same sentences.
"""
SECTIONS = (
    ("Data and split: every script", DataSettings, ()),
    ("All three stages", RunSettings, (DataSettings,)),
    ("Stages 1 and 2", SupervisedSettings, (RunSettings,)),
    ("Stage 1: `base_finetune.py`", base_finetune.Settings, (SupervisedSettings,)),
    ("Stage 2: `base_finetune_final.py`", base_finetune_final.Settings, (SupervisedSettings,)),
    ("Stage 3: `train_grpo.py`", train_grpo.Settings, (RunSettings,)),
    ("Evaluation: `evaluate_arc.py`", evaluate_arc.Settings, (DataSettings,)),
)


def default_of(field) -> str:
    """A field's default as a user writes it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or value == []:
        return "not set"
    if isinstance(value, list):
        return f"`{' '.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row_of(field) -> str:
    """A field's row of the table: name, default, and the sentence of `--help`."""
    sentence = field.metadata.get("help", "").replace("|", "\\|")
    return f"| `{field.name}` | {default_of(field)} | {sentence} |\n"


def page() -> str:
    """The page's text."""
    text = HEAD
    for title, settings, parents in SECTIONS:
        inherited = {row_of(field) for parent in parents for field in fields(parent)}
        text += f"\n## {title}\n\n| setting | default | |\n| --- | --- | --- |\n"
        text += "".join(row for row in map(row_of, fields(settings)) if row not in inherited)
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(
            None if PAGE.read_text(encoding="utf-8") == page() else "docs/settings.md: run python docs/make_settings.py"
        )
    PAGE.write_text(page(), encoding="utf-8")
