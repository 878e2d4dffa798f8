"""How a step is computed: what is chosen, that trying leaves no trace, and that no division changes a step."""

import functools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import base_finetune
from arc.models.collator import InputMaskingDataCollator
from arc.models.library_patches import let_run_ahead
from arc.models.loading import Precision
from arc.models.lora import add_lora
from arc.training import optimizers, trials
from arc.training.batch_planning import (
    choices,
    divisions_that_fit,
    divisors,
    faster_way,
    plan_batches,
)
from arc.training.stage import BatchPlan
from tests import tiny_models
from tests.helpers import call

GIB = 2**30
STEP = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]


def test_divisors_of_a_step():
    assert divisors(12) == [12, 6, 4, 3, 2, 1]
    assert divisors(1) == [1]


def memory(base, each, each_checkpointed):
    """A GPU's memory as a function of what is tried, with a room of 24 GiB; and what was tried."""
    tried = []

    def fits(size, on, must):
        tried.append((size, on, must))
        peak = (base + size * (each_checkpointed if on else each)) * GIB
        return peak, must or peak <= 24 * GIB

    return fits, tried


@pytest.mark.parametrize(
    ("each", "each_checkpointed", "expected"),
    [
        (1, 0.2, [(8, False)]),  # all at once: nothing else is tried
        (3, 0.5, [(4, False), (8, True)]),  # either may be faster: both are timed
        (30, 4, [(4, True)]),
        (60, 50, [(1, True)]),  # nothing fits: the smallest, whatever becomes of it
    ],
)
def test_the_largest_passes_that_fit_are_found(each, each_checkpointed, expected):
    fits, tried = memory(4, each, each_checkpointed)
    found = divisions_that_fit([8, 4, 2, 1], [False, True], 8, fits)
    assert [part[:2] for part in found] == expected
    assert tried[0] == (8, False, False)
    assert [part for part in tried if part[2]] == ([(1, True, True)] if expected == [(1, True)] else [])


def test_the_faster_engine_is_named_where_its_memory_is_there():
    plan = BatchPlan(8, 1, False, True, peak_bytes=14 * GIB)
    unsloth = Precision("unsloth", "bfloat16", True)
    assert "--engine transformers --load_in_4bit false" in faster_way(plan, unsloth, 80 * GIB)
    assert faster_way(plan, unsloth, 24 * GIB) is None
    assert faster_way(plan, Precision("transformers", "bfloat16", False), 80 * GIB) is None
    assert faster_way(BatchPlan(8, 1, True, True, peak_bytes=14 * GIB), unsloth, 80 * GIB) is None


def test_settings_and_the_plan_so_far_limit_the_choice():
    settings = base_finetune.Settings
    kept = BatchPlan(2, 4, True, True)
    assert choices(settings(), 8, True) == ([8, 4, 2, 1], [False, True])
    assert choices(settings(), 4, True) == ([4, 2, 1], [False, True])  # one of two processes
    assert choices(settings(micro_batch_size=4), 8, True) == ([4], [False, True])
    assert choices(settings(gradient_checkpointing=True), 8, True) == ([8, 4, 2, 1], [True])
    assert choices(settings(), 8, True, kept) == ([2, 1], [True])
    assert choices(settings(), 3, True, kept) == ([3, 1], [True])  # another number of GPUs than before
    assert choices(settings(micro_batch_size=8, gradient_checkpointing=False), 8, True, kept) == ([8], [False])
    assert choices(settings(), 8, False) == ([4], [True])  # a CPU: as published


def test_a_plan_says_what_it_is():
    plan = BatchPlan(8, 1, False, True, True, int(11.9 * GIB), 0.1224)
    assert plan.describe(6000) == (
        "a step: 1 forward pass of 8 samples, without padding, without gradient checkpointing, layers compiled; at "
        "most 11.9 GiB of GPU memory; 0.122 s a step, estimated time of 6,000 steps: 12 min 14 s"
    )
    assert BatchPlan(1, 8, True, False).describe(5) == (
        "a step: 8 forward passes of 1 sample, padded, with gradient checkpointing"
    )
    assert BatchPlan(64, 1, False, True, loader_processes=2).describe(5) == (
        "a step: 1 forward pass of 64 samples, without padding, without gradient checkpointing, batches made by 2 more "
        "processes"
    )


@pytest.fixture(scope="module")
def trial():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    precision = Precision("transformers", "float32", False)
    model = add_lora(LlamaForCausalLM(config), precision, r=4)
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    settings = base_finetune.Settings(lora_r=4, max_seq_length=40)
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(0, 80, length), "reply_spans": np.array([[2, 5], [6, length]])}
        for length in (20, 30, 25, 25)
    ]
    samples = SimpleNamespace(
        lengths=lambda: np.array([20, 30, 25, 25]), __getitems__=lambda numbers: [rows[number] for number in numbers]
    )
    run = SimpleNamespace(settings=settings, precision=precision)
    collator = InputMaskingDataCollator(tokenizer, mask_first_n_examples=1)
    return trials.SupervisedTrial(model, run, samples, collator, [0, 1, 2, 3])


def test_trying_leaves_no_trace(trial):
    weights = {name: value.clone() for name, value in trial.model.state_dict().items()}
    state = torch.get_rng_state()
    seconds = trial.seconds_per_step(BatchPlan(4, 2, False, False))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trial.model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in trial.model.state_dict().items())
    assert 0 < seconds < 60


def test_time_is_counted_by_tokens(trial, monkeypatch):
    # 20 tokens are timed, of one sample; a step has 8 samples of 25 tokens.
    monkeypatch.setattr(trial, "passes", lambda batches: 2.0)
    assert trial.seconds_per_step(BatchPlan(4, 2, False, False)) == pytest.approx(2.0 * 8 * 25 / 20)


def test_it_is_measured_only_where_the_time_is_wanted(trial, monkeypatch):
    timed = []
    monkeypatch.setattr(trial, "seconds_per_step", lambda plan: timed.append(plan) or 2.0)
    assert plan_batches(trial, steps=4).seconds_per_step == 2.0 and len(timed) == 1
    monkeypatch.setattr(trial, "tells_time", False)
    assert plan_batches(trial, steps=4).seconds_per_step is None and len(timed) == 1


@pytest.mark.parametrize("masked", [0, 1, 2])
def test_rows_that_are_tried_have_the_longest_length_and_something_to_learn(trial, masked):
    row = trials.uniform_row(40, masked, 80)
    collator = InputMaskingDataCollator(trial.collator.tokenizer, mask_first_n_examples=masked)
    ids, learned = collator.encode(row)
    assert len(ids) == 40 and learned.sum() == 40 - masked


def test_an_optimizer_is_timed_on_copies(trial):
    weights = {name: value.clone() for name, value in trial.model.state_dict().items()}
    seconds = optimizers.optimizer_seconds(trial.model, torch.optim.AdamW, {"lr": 1.0}, 1.0)
    assert 0 < seconds < 10
    assert all(torch.equal(value, weights[name]) for name, value in trial.model.state_dict().items())


def test_an_optimizer_that_does_not_wait_makes_the_same_steps(monkeypatch):
    import bitsandbytes

    module = bitsandbytes.optim.optimizer
    waits = []
    monkeypatch.setattr(module, "sync_gpu", waits.append)
    found = []
    for ahead in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.1)
        if ahead:
            let_run_ahead(optimizer)
            let_run_ahead(optimizer)  # twice does no harm
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
        before = len(waits)
        for _ in range(3):
            weight.grad = torch.randn(64, 128)
            optimizer.step()
            schedule.step()
        found.append((weight.detach().clone(), len(waits) - before))
    assert torch.equal(found[0][0], found[1][0])
    assert [count for _, count in found] == [3, 0]
    weight.grad = torch.randn(64, 128)
    bitsandbytes.optim.AdamW8bit([weight], lr=0.1).step()
    assert len(waits) == 4  # only that optimizer's are gone
    let_run_ahead(torch.optim.AdamW([weight]))  # another library's is left as it is


@pytest.fixture(scope="module")
def stage_flags(demo_base, demo_dataset):
    return [
        "--base_model", demo_base, "--dataset_dir", demo_dataset, "--sizes", 2, "--lora_r", 8, "--max_steps", 4, *STEP,
        "--eval_steps", 0, "--learning_rate", 1e-3, "--optim", "adamw_torch", "--holdout_examples", 6,
    ]  # fmt: skip


def run_stage(flags, folder):
    code, printed = call("base_finetune", *flags, "--output_dir", folder)
    assert code == 0, printed[-2000:]
    lora = folder / "Llama-3.2-1B-Base-lora"
    records = [json.loads(line) for line in (lora / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((lora / "manifest.json").read_text())
    return printed, [record for record in records if "loss" in record], manifest


def test_a_step_is_the_same_however_it_is_divided(stage_flags, tmp_path):
    losses, tokens = [], []
    for size, passes in ((8, 1), (2, 4), (None, 2)):
        flags = [*stage_flags, "--logging_steps", 1, "--save_steps", 0]
        flags += ["--micro_batch_size", size] if size else []
        printed, records, manifest = run_stage(flags, tmp_path / str(size))
        batches = manifest["batches"]
        assert (batches["micro_batch_size"], batches["passes"]) == (size or 4, passes)
        assert f"a step: {passes} forward pass" in printed and "estimated time of 4 steps" in printed
        losses.append([record["loss"] for record in records])
        tokens.append([record["num_input_tokens_seen"] for record in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert tokens[0] == tokens[1] == tokens[2] and len(set(tokens[0])) == 4


def test_what_is_tried_is_called_as_the_training_calls_it(stage_flags, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    seen, plain = [], LlamaForCausalLM.forward

    @functools.wraps(plain)
    def forward(self, *args, **keywords):
        if torch.is_grad_enabled():
            seen.append((len(args), *sorted(keywords)))
        return plain(self, *args, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    run_stage([*stage_flags, "--padding_free", True, "--save_steps", 0], tmp_path)
    assert "num_items_in_batch" in seen[0] and len(seen) > 4
    assert len(set(seen)) == 1, "compiled layers are compiled anew for other keywords"


def test_tokens_are_counted_between_logs_too(stage_flags, tmp_path):
    _, often, _ = run_stage([*stage_flags, "--logging_steps", 1, "--save_steps", 0], tmp_path / "often")
    _, seldom, _ = run_stage([*stage_flags, "--logging_steps", 3, "--save_steps", 2], tmp_path / "seldom")
    seen = {record["step"]: record["num_input_tokens_seen"] for record in often}
    assert all(record["num_input_tokens_seen"] == seen[record["step"]] for record in seldom)
    work = tmp_path / "seldom" / "Llama-3.2-1B-Base-checkpoints"
    state = json.loads((work / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == seen[2]  # a checkpoint between two logs has its own
    kept = state["stateful_callbacks"]["Plan"]["attributes"]
    assert (kept["micro_batch_size"], kept["passes"]) == (4, 2)


def test_a_size_that_does_not_divide_a_step_is_refused(stage_flags, tmp_path):
    code, printed = call("base_finetune", *stage_flags, "--micro_batch_size", 3, "--output_dir", tmp_path)
    assert code == 2
    assert "--micro_batch_size is 3: expected a divisor of the 8 of a step" in printed


@pytest.mark.gpu
def test_what_fits_a_gpu_is_found_and_said(stage_flags, tmp_path):
    printed, _, manifest = run_stage([*stage_flags, "--engine", "transformers"], tmp_path)
    batches = manifest["batches"]
    assert (batches["micro_batch_size"], batches["gradient_checkpointing"], batches["padding_free"]) == (8, False, True)
    gib = float(re.search(r"at most ([\d.]+) GiB of GPU memory", printed)[1])
    assert 0 < gib < torch.cuda.get_device_properties(0).total_memory / GIB


@pytest.mark.gpu
def test_on_a_gpu_an_optimizer_that_does_not_wait_makes_the_same_steps():
    import bitsandbytes

    found = []
    for ahead in (False, True):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(512, 512, device="cuda")) for _ in range(20)]
        optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=0.1)
        if ahead:
            let_run_ahead(optimizer)
        for _ in range(3):
            sum((weight @ weight).square().mean() for weight in weights).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack([weight.detach() for weight in weights]))
    assert torch.equal(*found)
