"""LoRA on the weights: the same training as on the activations, and none of it outside of training."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from batch_planning import compile_layers
from folded_lora import fold_lora
from model_tools import LINEAR_MODULES


def adapted(**lora):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    options = {"r": 32, "lora_alpha": 40, "use_rslora": True, "target_modules": list(LINEAR_MODULES)} | lora
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # as after some training
    return model.train()


@pytest.fixture(scope="module")
def pair():
    plain = adapted()
    folded = copy.deepcopy(plain)
    assert fold_lora(folded) == 14  # 7 in each of 2 layers
    return plain, folded


IDS = torch.arange(60).reshape(3, 20) % 50


def gradients(model):
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return output.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_and_gradients_are_those_of_lora(pair):
    (logits, plain), (folded_logits, folded) = map(gradients, pair)
    torch.testing.assert_close(folded_logits, logits, rtol=0, atol=1e-5)
    assert set(plain) == set(folded) and len(plain) == 28
    for name in plain:
        torch.testing.assert_close(folded[name], plain[name], rtol=1e-3, atol=1e-6)


def test_compiled_too(pair):
    compiled = copy.deepcopy(pair[1])
    compile_layers(compiled)
    _, expected = gradients(pair[0])
    logits, found = gradients(compiled)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


def test_without_gradients_it_is_lora_as_ever(pair):
    with torch.no_grad():
        assert torch.equal(pair[0](input_ids=IDS).logits, pair[1](input_ids=IDS).logits)
        with pair[1].disable_adapter():
            base = pair[1](input_ids=IDS).logits
    with pair[1].disable_adapter():
        torch.testing.assert_close(pair[1](input_ids=IDS).logits, base, rtol=0, atol=1e-5)
    assert (base - pair[0](input_ids=IDS).logits).abs().max() > 1e-2


def test_saved_as_any_adapter(pair, tmp_path):
    plain, folded = pair
    folded.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    saved = [path / "adapter_model.safetensors" for path in (tmp_path, tmp_path / "plain")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_in_16_bits_the_sum_is_rounded_once():
    # Each of 32 weights is W + s·B·A = (1 + 2^power) / 32. In bfloat16 the last digit of 1 is 2^-7: half of it is a tie
    # that goes to the even 1, and less is not seen at all.
    model = adapted(r=1, lora_alpha=1, target_modules=["q_proj"]).to(torch.bfloat16)
    fold_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    for power, expected in ((-9, 1.0), (-8, 1.0), (-7, 1 + 2**-7)):
        with torch.no_grad():
            layer.base_layer.weight.fill_(1 / 32)
            layer.lora_A["default"].weight.fill_(1 / 32)
            layer.lora_B["default"].weight.fill_(2.0**power)
        assert layer(x)[0, 0].item() == expected


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_cannot_be_folded_is_refused(lora):
    with pytest.raises(ValueError, match="only plain LoRA can"):
        fold_lora(adapted(**lora))


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="no LoRA layers"):
        fold_lora(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                               num_attention_heads=2)))  # fmt: skip
