"""The demo's base model: reproducible, like Llama, and careful with what is there."""

import json
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from demo import make_base
from tests.helpers import ROOT, run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "base"
    run("demo/make_base.py", "--out", out, fresh=True, PYTHONHASHSEED="1")
    return out


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_the_base_loads_and_is_like_llama(base, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (512, 64)
    assert model.config.num_attention_heads == 4
    assert model.config.num_key_value_heads == 2
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.pad_token_id is None
    named = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == named
    ids = torch.tensor([tokenizer("I12\n34")["input_ids"]])
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= ids.shape[1] + 3


def test_special_tokens(tokenizer):
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token is None
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens(list(range(496, 512))) == make_base.SPECIAL_TOKENS
    for token in make_base.SPECIAL_TOKENS:
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    assert {"<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"} < set(make_base.SPECIAL_TOKENS)


def test_the_tokenizer_adds_bos_and_gives_the_text_back(tokenizer):
    text = "I120\n003\n+/-=O5\n<|eot_id|>Ünïcode, Turn  the grid!\r\n\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_digits_merge_in_groups_of_up_to_three(tokenizer):
    vocabulary = tokenizer.get_vocab()
    lengths = Counter(len(token) for token in vocabulary if token.isascii() and token.isdigit())
    assert lengths[1] == 10
    assert lengths[2] >= 50
    assert lengths[3] >= 10
    assert set(lengths) == {1, 2, 3}
    assert tokenizer.tokenize("0000000") == ["000", "000", "0"]
    # The marks of the text format do not survive as tokens of their own, as with the real vocabulary.
    assert len(tokenizer.tokenize("+/-=")) < 4


@pytest.mark.parametrize("character", [*string.ascii_letters, *string.digits, *"!?.:,;*+/-=", "\n"])
def test_a_character_alone_is_one_token_of_its_own(tokenizer, character):
    (token,) = tokenizer(character, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([token]) == character


def test_the_base_is_reproducible(base, tmp_path):
    run("demo/make_base.py", "--out", tmp_path / "again", fresh=True, PYTHONHASHSEED="2")
    assert contents(base) == contents(tmp_path / "again")


def test_the_rotary_base_is_chosen_and_kept(base, tmp_path, capsys):
    out = tmp_path / "b"
    assert make_base.main(["--out", str(out), "--rope_theta", "10000"]) == 0
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert [config["rope_parameters"].pop("rope_theta") for config in configs] == [500000.0, 10000.0]
    assert configs[0] == configs[1]
    assert make_base.main(["--out", str(out)]) == 2  # there with another one
    record = out / "make_base.json"
    made = json.loads(record.read_text())
    del made["settings"]["rope_theta"]  # a record from before there was a choice: it was Llama 3's
    record.write_text(json.dumps(made))
    capsys.readouterr()
    assert make_base.main(["--out", str(out)]) == 0 and "there already" in capsys.readouterr().out
    assert make_base.main(["--out", str(out), "--rope_theta", "10000"]) == 2


def test_the_base_is_not_made_twice_or_overwritten(base, tmp_path, capsys):
    before = contents(base)
    assert make_base.main(["--out", str(base)]) == 0
    assert "there already" in capsys.readouterr().out
    assert make_base.main(["--out", str(base), "--seed", "5"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert contents(base) == before
    (tmp_path / "mine.txt").write_text("mine")
    assert make_base.main(["--out", str(tmp_path)]) == 2
    assert "did not write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab", "200"], "--vocab is 200: expected 272"),
        (["--vocab", "100000"], "the training text gives no more"),
        (["--hidden", "60"], "--hidden is 60: expected a multiple of twice --heads, 8"),
        (["--layers", "0"], "--layers"),
        (["--seed", "-1"], "--seed"),
        (["--rope_theta", "1"], "--rope_theta is 1: expected a number above 1"),
    ],
)
def test_bad_settings_of_the_base(tmp_path, capsys, flags, expected):
    assert make_base.main(["--out", str(tmp_path / "b"), *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["make_dataset.py", "make_base.py"])
def test_help_needs_no_heavy_library(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'demo' / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
