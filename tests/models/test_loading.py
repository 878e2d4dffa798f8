"""Cutting the vocabulary, LoRA and saving, on models small enough for any machine."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from arc.models import loading, lora
from arc.models import prepared_base as prepared_base_module
from arc.models import vocabulary as vocabulary_module
from arc.models.loading import Precision
from arc.training import trainer
from arc.training.batch_planning import compile_layers
from tests.tiny_models import PUZZLE, byte_level_tokenizer, logits_of, prepared_base, save_base, sentencepiece_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


@pytest.mark.parametrize(("make", "end"), [(byte_level_tokenizer, "<|eot_id|>"), (sentencepiece_tokenizer, "</s>")])
@pytest.mark.parametrize("tied", [True, False])
def test_prepared_base_has_one_token_per_character_and_the_same_logits(tmp_path, make, end, tied):
    base = save_base(tmp_path / "base", make(), tied)
    (tmp_path / "prepared").mkdir()
    done = prepared_base_module.prepare_base(base, tmp_path / "prepared")
    old, new = vocabulary_module.load_tokenizer(base), vocabulary_module.load_tokenizer(tmp_path / "prepared")
    puzzle = PUZZLE.replace("<|eot_id|>", end)
    ids = new(puzzle)["input_ids"]
    assert len(ids) == 1 + len(puzzle.replace(end, "$"))
    assert new.decode(ids) == new.bos_token + puzzle
    assert len(old(puzzle)["input_ids"]) < len(ids)  # the whole vocabulary does merge
    assert new.pad_token == old.pad_token != new.eos_token == old.eos_token
    assert done["vocabulary"] == len(new) < 90 < done["vocabulary_before"]

    kept = [old.convert_tokens_to_ids(t) for t in new.convert_ids_to_tokens(list(range(len(new))))]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared", dtype=torch.float32)
    new_ids = torch.tensor([ids])
    old_ids = torch.tensor(kept)[new_ids]
    assert torch.equal(logits_of(before, old_ids)[..., kept], logits_of(after, new_ids))
    named = after.config.eos_token_id + [after.config.pad_token_id, after.generation_config.pad_token_id]
    assert [kept[i] for i in named] == [old.eos_token_id, 1, old.pad_token_id, old.pad_token_id]
    shared = after.get_input_embeddings().weight.data_ptr() == after.get_output_embeddings().weight.data_ptr()
    assert shared is tied


def test_full_vocabulary_is_kept_whole(tmp_path):
    base = save_base(tmp_path / "base", byte_level_tokenizer())
    (tmp_path / "prepared").mkdir()
    done = prepared_base_module.prepare_base(base, tmp_path / "prepared", full_vocab=True)
    tokenizer = vocabulary_module.load_tokenizer(tmp_path / "prepared")
    assert done["vocabulary"] == done["vocabulary_before"] == len(tokenizer)
    assert tokenizer(PUZZLE)["input_ids"] == vocabulary_module.load_tokenizer(base)(PUZZLE)["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "prepared").config.pad_token_id == tokenizer.pad_token_id


def test_a_quantised_base_is_refused_with_the_name_of_a_16_bit_one(tmp_path):
    base = save_base(tmp_path / "Llama-3.2-1B-Instruct-bnb-4bit", byte_level_tokenizer())
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised already.*--base_model .*Llama-3.2-1B-Instruct$"):
        prepared_base_module.prepare_base(base, tmp_path)


def test_a_missing_base_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot load the model .*hf auth login.*--base_model FOLDER"):
        prepared_base_module.check_base(tmp_path / "nothing")


def test_a_vocabulary_that_is_not_bpe_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "</s>": 2}, unk_token="a"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    with pytest.raises(ValueError, match="WordLevel.*--full_vocab"):
        vocabulary_module.cut_tokenizer(fast)


def test_a_pad_token_that_is_the_end_token_is_replaced(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert vocabulary_module.load_tokenizer(tmp_path).pad_token == "<|finetune_right_pad_id|>"


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tied and untied prepared bases."""
    return {tied: prepared_base(tmp_path_factory.mktemp(f"tied_{tied}"), tied) for tied in (True, False)}


def test_rslora_scales_by_the_root_of_the_rank(bases):
    precision = Precision("transformers", "float32", False)
    for r in (4, 64):
        model = lora.add_lora(loading.load_model(bases[True], precision)[0], precision, r=r, lora_alpha=24)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(24 / math.sqrt(r))


def test_trained_embeddings_have_a_rate_of_their_own(bases):
    precision = Precision("transformers", "float32", False)
    model = lora.add_lora(loading.load_model(bases[True], precision)[0], precision, r=4)
    for optim in ("adamw_torch", "adamw_8bit"):
        arguments = TrainingArguments(optim=optim, learning_rate=1e-4, use_cpu=True, report_to=[])
        arguments.embedding_learning_rate = 1e-5
        optimizer = trainer.optimizer_with_embedding_rate(model, arguments)
        groups = {group["lr"]: group["params"] for group in optimizer.param_groups}
        assert set(groups) == {1e-4, 1e-5}
        assert [p.shape for p in groups[1e-5]] == [model.get_input_embeddings().weight.shape]
        assert len(groups[1e-4]) == 2 * 7 * 2  # A and B of seven layers in two blocks


def test_the_same_random_state_gives_the_same_adapter(bases):
    precision = Precision("transformers", "float32", False)
    states = []
    for seed in (1, 1, 2):
        model = lora.add_lora(loading.load_model(bases[True], precision)[0], precision, r=4, random_state=seed)
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


def test_an_adapter_of_another_base_is_refused(tmp_path, bases):
    precision = Precision("transformers", "float32", False)
    model, tokenizer = loading.load_model(bases[True], precision)
    model = lora.add_lora(model, precision, r=4)
    lora.save_adapter(model, tokenizer, tmp_path / "lora", base=bases[True], precision=precision)
    other = save_base(tmp_path / "other", byte_level_tokenizer())
    with pytest.raises(ValueError, match="trained on another base"):
        lora.load_adapter(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32), tmp_path / "lora")


def test_precision_of_a_machine_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.resolve_precision() == Precision("transformers", "float32", False)
    assert loading.resolve_precision(load_in_4bit=True).load_in_4bit
    with pytest.raises(ValueError, match="--engine unsloth cannot run here: no CUDA device.*--engine transformers"):
        loading.resolve_precision("unsloth")


def test_layers_that_were_compiled_for_training_decode_as_they_were(bases):
    model, _ = loading.load_model(bases[True], Precision("transformers", "float32", False))
    compile_layers(model.train())
    compiled = [layer._compiled_call_impl for layer in model.model.layers]
    with loading.decoding(model, "transformers"):
        assert not any(layer._compiled_call_impl for layer in model.model.layers)
    assert all(compiled) and [layer._compiled_call_impl for layer in model.model.layers] == compiled
    compile_layers(model, undo=True)
    assert not any(layer._compiled_call_impl for layer in model.model.layers)
