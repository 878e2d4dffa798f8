"""LoRA on the weights: the same training as on the activations, and none of it outside of training."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from arc.models.folded_lora import fold_lora
from arc.models.lora import LINEAR_MODULES
from arc.training.batch_planning import compile_layers
from tests.helpers import run


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
    # Each of 32 weights becomes (1 + 2^-8 + 2^-17) / 32. In bfloat16 the last digit of 1 is 2^-7: a little more than a
    # half of it is added, which one rounding makes a whole one. Rounded before it is added, as a product of its own or
    # of the activations, it would be just a half, which goes to the even 1.
    model = adapted(r=2, lora_alpha=1, use_rslora=False, target_modules=["q_proj"]).to(torch.bfloat16)
    fold_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.fill_(1 / 32)
        layer.lora_A["default"].weight.fill_(1 / 32)
        layer.lora_B["default"].weight.copy_(torch.tensor([2.0**-7, 2.0**-16]))  # scaled by alpha / r, a half
        assert layer(torch.ones(1, 32, dtype=torch.bfloat16))[0, 0].item() == 1.0  # LoRA as ever, without gradients
    assert layer(torch.ones(1, 32, dtype=torch.bfloat16))[0, 0].item() == 1 + 2**-7


def test_only_the_weights_are_multiplied_in_training(pair):
    calls = []
    layers = [m for name, m in pair[1].named_modules() if name.endswith(("lora_A.default", "lora_B.default"))]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    gradients(pair[1])
    assert len(layers) == 28 and not calls
    with torch.no_grad():
        pair[1](input_ids=IDS)
    assert len(calls) == 28
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def flags(demo_dataset, demo_base):
    return [
        "--dataset_dir", demo_dataset, "--base_model", demo_base, "--max_steps", 2, "--lora_r", 8, "--n", 4,
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--holdout_examples", 2,
        "--eval_steps", 0, "--engine", "transformers",
    ]  # fmt: skip


def test_a_stage_trains_so_and_its_merge_is_proven(flags, tmp_path):
    outputs = {}
    for fold in ("false", "true"):
        printed = run("base_finetune.py", *flags, "--fold_lora", fold, "--output_dir", tmp_path / fold)
        assert "merge proven" in printed
        outputs[fold] = load_file(tmp_path / fold / "Llama-3.2-1B-Base-lora" / "adapter_model.safetensors")
    assert set(outputs["true"]) == set(outputs["false"])
    far = [(outputs["true"][name] - outputs["false"][name]).abs().max().item() for name in outputs["true"]]
    assert 0 < max(far) < 1e-5, "the same training, in another order of operations"
    # Artifacts of a version that had no such setting were made without: they are not taken for folded ones.
    path = tmp_path / "false" / "Llama-3.2-1B-Base-lora" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["settings"].pop("fold_lora") is False
    path.write_text(json.dumps(manifest), encoding="utf-8")
    printed = run("base_finetune.py", *flags, "--fold_lora", "true", "--output_dir", tmp_path / "false", expect=2)
    assert "fold_lora (was false, is true)" in printed
    assert "training skipped" in run("base_finetune.py", *flags, "--output_dir", tmp_path / "false")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--load_in_4bit", "true"], "--fold_lora is for --engine transformers and weights that are not in 4 bits"),
        (["--lora_dropout", "0.1"], "--fold_lora true: not beside --lora_dropout"),
    ],
)
def test_flags_that_do_not_go_together(flags, tmp_path, more, expected):
    printed = run("base_finetune.py", *flags, "--fold_lora", "true", *more, "--output_dir", tmp_path / "o", expect=2)
    assert expected in printed and not (tmp_path / "o").exists()


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_cannot_be_folded_is_refused(lora):
    with pytest.raises(ValueError, match="only plain LoRA can"):
        fold_lora(adapted(**lora))


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="no LoRA layers"):
        fold_lora(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                               num_attention_heads=2)))  # fmt: skip
