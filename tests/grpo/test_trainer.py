"""The trainer of stage 3: sharing prompts changes what is computed twice, and nothing else."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from arc.grpo import sharing as sharing_module
from arc.grpo.sharing import check_sharing, samples_from_copy, shares_prompts
from arc.grpo.trial import PolicyTrial
from arc.models.loading import Precision
from arc.models.lora import add_lora
from arc.models.packing import use_packed_attention
from arc.training.stage import BatchPlan
from tests.helpers import call

SMALL = (
    "--engine", "transformers", "--sizes", 2, "--perm", False, "--max_seq_length", 160, "--lora_r", 8,
    "--num_generations", 4,
    "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2, "--max_steps", 3, "--eval_steps", 0,
    "--save_steps", 0, "--holdout_examples", 6, "--logging_steps", 1, "--skip_scan", True, "--fast_rollouts", True,
    "--learning_rate", 0.05, "--optim", "sgd", "--max_grad_norm", 1e9, "--report_to", "none",
)  # fmt: skip


@pytest.fixture(scope="module")
def policy(taught_policy):
    return (*SMALL, *taught_policy)


def trained(output, *flags):
    code, printed = call("train_grpo", *flags, "--output_dir", output)
    assert code == 0, printed
    lora = output / "Llama-3.2-1B-Final-RL-lora"
    records = [json.loads(line) for line in (lora / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], load_file(lora / "adapter_model.safetensors"), printed


@pytest.mark.parametrize("extra", [(), ("--beta", 0.2, "--loss_type", "grpo", "--temperature", 0.7)])
def test_a_shared_prompt_trains_the_same(tmp_path, policy, extra):
    own, weights, _ = trained(tmp_path / "own", *policy, *extra)
    assert any(r["grad_norm"] > 0 for r in own)
    for name, more in (("at once", ("--micro_batch_size", 16)), ("in parts", ("--gradient_checkpointing", False))):
        records, shared, printed = trained(tmp_path / name, *policy, *extra, "--shared_prompts", True, *more)
        passes, size = (1, 16) if name == "at once" else (2, 8)
        assert f"a step: {passes} forward pass{'es' * (passes > 1)} of {size} completions, without padding" in printed
        for record, before in zip(records, own, strict=True):
            assert record["reward"] == before["reward"]
            for figure in ("entropy", "grad_norm", *(["kl"] if extra else [])):
                assert record[figure] == pytest.approx(before[figure], rel=1e-3, abs=2e-5), figure
        for part, tensor in weights.items():
            assert torch.allclose(tensor, shared[part], atol=1e-5), part


@pytest.mark.parametrize("way", ["copy", "trl", "along solutions"])
def test_a_training_that_diverges_says_so_however_it_samples(tmp_path, policy, way):
    more = STOPPED if way == "along solutions" else ("--fast_rollouts", way == "copy")
    more += ("--learning_rate", 1e30, "--max_steps", 9)
    code, printed = call("train_grpo", *policy, *more, "--output_dir", tmp_path)
    assert code == 1, printed
    assert re.search(r"the model answers with NaN after step [1-4], while training: nothing was saved", printed)
    assert "Lower --learning_rate (now 1e+30)" in printed


STOPPED = ("--stop_at_error", True, "--fast_rollouts", False, "--reward_cells", 0, "--micro_batch_size", 16)


def test_completions_end_with_their_first_wrong_token(tmp_path, policy, monkeypatch):
    records, weights, printed = trained(tmp_path / "stopped", *policy, *STOPPED)
    whole, _, _ = trained(tmp_path / "whole", *policy, "--reward_cells", 0, "--micro_batch_size", 16)
    assert "a step: 1 forward pass of 16 completions, without padding" in printed
    # The first step's samples are those of whole completions, cut off: as many of them are right.
    assert records[0]["rewards/exact_match/mean"] == whole[0]["rewards/exact_match/mean"]
    assert records[0]["reward_std"] == pytest.approx(whole[0]["reward_std"])
    assert records[0]["completions/mean_length"] < whole[0]["completions/mean_length"]
    assert any(0 < r["rewards/exact_match/mean"] < 1 and r["grad_norm"] > 0 for r in records)
    for record in records:  # a wrong end is wrong too, so that no more are stopped than are wrong
        assert record["completions/stopped_ratio"] <= 1 - record["rewards/exact_match/mean"] + 1e-6
        assert not {"completions/clipped_ratio", "rewards/cell_accuracy/mean"} & set(record)
    # Groups without signal are left out of the update, which is the same.
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda tensor: torch.arange(len(tensor))[:, None])
    _, every, _ = trained(tmp_path / "every", *policy, *STOPPED)
    for part, tensor in weights.items():
        assert torch.allclose(tensor, every[part], atol=1e-5), part


@pytest.mark.parametrize(
    "more",
    [
        ("--reward_cells", 0.1),
        ("--fast_rollouts", True),
        ("--shared_prompts", False),
        ("--loss_type", "grpo"),
        ("--lora_dropout", 0.1),
    ],
    ids=lambda more: more[0],
)
def test_what_cannot_be_stopped(tmp_path, policy, more):
    code, printed = call("train_grpo", *policy, *STOPPED, *more, "--output_dir", tmp_path)
    assert code == 2, printed
    assert f"--stop_at_error is True: expected not beside {more[0]}" in printed


def test_who_samples_and_who_shares(monkeypatch, tmp_path):
    model = tiny_models_model()
    run = SimpleNamespace(settings=train_grpo.Settings(), precision=Precision("unsloth", "bfloat16", True))
    run.parent = tmp_path
    model.config.save_pretrained(tmp_path)
    assert not samples_from_copy(model, run.settings, run.precision.engine) and not shares_prompts(model, run)
    run.settings.shared_prompts, run.settings.fast_rollouts = True, False
    with pytest.raises(ValueError, match="not with --fast_rollouts false"):
        check_sharing(run)
    run.settings.fast_rollouts = run.settings.shared_prompts = None
    assert not shares_prompts(model, run)
    run.settings = train_grpo.Settings(shared_prompts=True, fast_rollouts=True)
    check_sharing(run)
    assert samples_from_copy(model, run.settings, run.precision.engine) and shares_prompts(model, run)

    # A GPU: by the memory that the copy takes.
    run.settings = train_grpo.Settings()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sharing_module, "can_pack", lambda model, dtype: True)
    for times, expected in ((5.9, False), (6.1, True)):
        memory = SimpleNamespace(total_memory=times * sharing_module.copy_bytes(model, run.settings))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, memory=memory: memory)
        assert samples_from_copy(model, run.settings, run.precision.engine) is expected
        assert shares_prompts(model, run) is expected  # Unsloth's own generate goes with its own trainer
    run.settings.fast_rollouts = False
    assert not samples_from_copy(model, run.settings, run.precision.engine) and not shares_prompts(model, run)
    run.precision = Precision("transformers", "bfloat16", False)
    assert shares_prompts(model, run)


def tiny_models_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return add_lora(LlamaForCausalLM(config), Precision("transformers", "float32", False), r=4)


def test_passes_that_are_tried():
    model = tiny_models_model()
    use_packed_attention(model)
    settings = train_grpo.Settings(
        num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_seq_length=40, lora_r=4
    )
    rng = np.random.default_rng(0)
    spans = [np.array([[2, 5], [15, end]]) for end in (20, 21)]
    rows = [{"input_ids": rng.integers(0, 80, ends[-1, 1]), "reply_spans": ends} for ends in spans]
    data = SimpleNamespace(samples=SimpleNamespace(__getitems__=lambda numbers: [rows[at % 2] for at in numbers]))
    run = SimpleNamespace(settings=settings, precision=Precision("transformers", "float32", False))
    trial = PolicyTrial(model, run, data, 6, from_copy=False)
    assert not trial.tells_time, "without the sampling it says little"
    prompts, replies, more = trial.longest(8)
    assert more is None, "nothing is learned besides"
    assert {len(prompt) for prompt in prompts} == {40} and {len(reply) for reply in replies} == {6}
    assert [sum(prompt is other for other in prompts) for prompt in prompts] == [2] * 8  # a step has four
    assert len({reply.tobytes() for reply in replies}) == 8
    prompts, replies, _ = trial.typical(8)[0]
    assert len({reply.tobytes() for reply in replies}) == 8, "whole completions of a group differ"
    assert [len(prompt) for prompt in prompts] == [15] * 8 and [len(reply) for reply in replies] == [5] * 4 + [6] * 4
    assert 0 < trial.seconds_per_step(BatchPlan(8, 2, False, True)) < 60
    settings.stop_at_error = True  # those that are stopped follow their prompt's solution
    for prompts, replies, _ in (trial.longest(8), trial.typical(8)[0]):
        pairs = {(prompt.tobytes(), reply.tobytes()) for prompt, reply in zip(prompts, replies, strict=True)}
        assert len(pairs) == len({prompt for prompt, _ in pairs})
    assert all(parameter.grad is None for parameter in model.parameters())
