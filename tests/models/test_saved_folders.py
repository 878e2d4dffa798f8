"""Saved adapters and models: a card that says how they were made, and files that others may read."""

import os
import stat
from pathlib import Path

import pytest

from arc.merging.merge import merge_adapter
from arc.models.cards import model_card
from arc.models.loading import Precision, load_model
from arc.models.lora import add_lora, save_adapter
from tests.tiny_models import prepared_base

PRECISION = Precision("transformers", "float32", False)
MANIFEST = {
    "stage": "Base",
    "script": "base_finetune.py",
    "made": "2024-05-06T07:08:09Z",
    "settings": {"lora_r": 4, "learning_rate": 1e-4, "target_modules": ["q_proj", "lm_head"], "output_dir": "secret"},
}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_saved_files_have_the_mode_of_the_umask_and_a_card(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        base = prepared_base(tmp_path)
        model, tokenizer = load_model(base, PRECISION)
        lora, merged = tmp_path / "lora", tmp_path / "merged"
        for folder in (lora, merged):
            folder.mkdir()
        model = add_lora(model, PRECISION, r=4)
        save_adapter(model, tokenizer, lora, base=base, precision=PRECISION, manifest=MANIFEST)
        merge_adapter(lora, merged)
    finally:
        os.umask(before)
    for folder in (base, lora, merged):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}, folder
        assert any(path.suffix == ".safetensors" for path in files)
    for folder, words in ((lora, "AutoPeftModelForCausalLM"), (merged, "merged onto the 16-bit base")):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert words in card and "`prepared`" in card and "| lora_r | 4 |" in card and "stage Base" in card
        assert str(tmp_path) not in card and "secret" not in card and "2024" not in card


def test_a_card_depends_on_neither_time_nor_place():
    merge = {"merged_onto": "quantised", "dtype": "bfloat16", "precision": {"dtype": "bfloat16", "load_in_4bit": True}}
    cards = [
        model_card({**MANIFEST, **more, "made": time, "base": str(place / "Llama-prepared")})
        for more in ({"precision": merge["precision"]}, merge)
        for time, place in (("now", Path("/a")), ("then", Path("/b/c")))
    ]
    assert cards[0] == cards[1] and cards[2] == cards[3] and cards[0] != cards[2]
    assert "in 4 bits" in cards[0] and "quantised base" in cards[2]


def test_a_card_of_what_nobody_recorded():
    assert "its base" in model_card({}) and "outside of the stage scripts" in model_card({})
