"""Changes to other libraries: what each does, and that its undo brings everything back."""

import sys
import types

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arc.models import library_patches
from arc.models.folded_lora import fold_lora
from arc.models.packing import pack_rows, use_packed_attention


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_an_attribute_is_put_back_unless_another_has_replaced_it():
    module = types.SimpleNamespace(a=1)
    library_patches.replace_attribute(module, "a", 2)()
    library_patches.replace_attribute(module, "b", 2)()
    assert vars(module) == {"a": 1}
    undo = library_patches.replace_attribute(module, "a", 2)
    module.a = 3
    undo()
    assert module.a == 3


def test_packed_attention_is_undone(model):
    rows = [(np.arange(length), np.ones(length, dtype=bool)) for length in (7, 5)]
    batch = pack_rows(rows, "transformers")
    ids = torch.arange(20).reshape(2, 10)
    before = model(ids).logits
    undo = use_packed_attention(model)
    packed = model(**batch).logits
    undo()
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)
    plain = {name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}
    torch.testing.assert_close(model(**plain).logits, packed)  # transformers separates documents by their positions


def test_unsloths_attention_is_wrapped_in_each_module_and_put_back(monkeypatch):
    modules = {name: types.ModuleType(f"unsloth.models.{name}") for name in ("llama", "qwen3", "other")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if name != "other":
            module.run_attention = plain_attention
    undo = library_patches.wrap_unsloth_attention(lambda plain: lambda **_: ("wrapped", plain))
    assert modules["llama"].run_attention() == modules["qwen3"].run_attention() == ("wrapped", plain_attention)
    undo()
    assert {vars(module).get("run_attention") for module in modules.values()} == {plain_attention, None}


def plain_attention(**_):
    """As Unsloth's."""


def test_unsloths_reader_is_put_back(monkeypatch):
    assert library_patches.wrap_unsloth_reader(lambda plain: plain) is None
    kernels = types.ModuleType(library_patches.UNSLOTH_KERNELS)
    vars(kernels)[library_patches.UNSLOTH_READER] = plain_attention
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    undo = library_patches.wrap_unsloth_reader(lambda plain: lambda layer: layer)
    assert getattr(kernels, library_patches.UNSLOTH_READER) is not plain_attention
    undo()
    assert getattr(kernels, library_patches.UNSLOTH_READER) is plain_attention


def test_an_optimizer_waits_again():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(2))])
    undo = library_patches.let_run_ahead(optimizer)
    assert "step" in vars(optimizer)
    undo()
    assert "step" not in vars(optimizer)


def test_layers_get_their_class_back(model):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear

    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    layers = [module for module in adapted.modules() if isinstance(module, Linear)]
    fold_lora(adapted)
    assert not any(type(layer) is Linear for layer in layers)
    undo = library_patches.change_class(layers, Linear)
    assert all(type(layer) is Linear for layer in layers)
    undo()
    assert not any(type(layer) is Linear for layer in layers)


def test_a_plain_module_is_another_than_the_one_that_was_changed(monkeypatch):
    from transformers.models.llama import modeling_llama

    assert library_patches.plain_class(LlamaForCausalLM) is LlamaForCausalLM
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", None)
    plain = library_patches.plain_class(LlamaForCausalLM)
    assert plain is library_patches.plain_class(LlamaForCausalLM) is not LlamaForCausalLM and plain.forward
    assert plain.__module__ in sys.modules
    library_patches.forget_plain_modules()
    assert plain.__module__ not in sys.modules


def test_equal_rows_are_decoded_once():
    asked = []

    class Tokenizer:
        eos_token = "$"

        def batch_decode(self, rows, **options):
            asked.extend(rows)
            return ["".join(map(str, row)) for row in rows]

    tokenizer = Tokenizer()
    trainer = types.SimpleNamespace(processing_class=tokenizer)
    with library_patches.decoding_once(trainer):
        assert trainer.processing_class.batch_decode([[1, 2], [3], [1, 2]]) == ["12", "3", "12"]
        assert trainer.processing_class.eos_token == "$"
    assert trainer.processing_class is tokenizer and asked == [[1, 2], [3]]
