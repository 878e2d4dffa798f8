"""Stage 2's loss beside the policy's: which samples a step learns, and that its passes add up."""

import multiprocessing
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import train_grpo
from arc.grpo import supervised_mix as supervised_mix_module
from arc.grpo.prompts import PromptRows
from arc.grpo.supervised_mix import SupervisedMix
from arc.grpo.trial import PolicyTrial
from arc.models.collator import InputMaskingDataCollator
from arc.models.loading import Precision
from arc.models.lora import add_lora
from arc.models.packing import use_packed_attention
from arc.models.vocabulary import load_tokenizer
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.text import format_options
from arc.training.data import StageData
from arc.training.rows import lazy_dataset
from tests.grpo.test_trainer import SMALL, STOPPED, trained
from tests.helpers import call
from tests.script_processes import Script
from tests.scripts.test_stages import artifact
from tests.scripts.test_survival import wait_for_step

PRECISION = Precision("transformers", "float32", False)
MIXED = ("--supervised_weight", 2, "--supervised_batch_size", 6)


@pytest.fixture(scope="module")
def policy(taught_policy):
    return (*SMALL, *taught_policy)


@pytest.fixture(scope="module")
def data(taught_policy):
    tokenizer = load_tokenizer(taught_policy[3])
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    puzzles = ArcDataset.load_from_local_json(taught_policy[1], sizes=(2,)).subset(3)
    samples = TrainingSamples(puzzles, encoder, 160, seed=44, tp="all", rt="all", perm=False, shfl_ex=True)
    return StageData(None, samples, encoder, tokenizer, puzzles)


def mix_of(data, size=6, steps=40, passes=1):
    settings = SimpleNamespace(
        supervised_batch_size=size, max_steps=steps, seed=44, dataloader_num_workers=None, samples_per_step=8,
        num_generations=4, num_train_epochs=1.0,
    )  # fmt: skip
    mix = SupervisedMix(SimpleNamespace(settings=settings, precision=PRECISION), data)
    mix.passes = passes
    return mix


def test_an_epoch_has_each_sample_once_in_views_that_no_prompt_has(data, monkeypatch):
    count = len(data.samples)
    mix = mix_of(data, size=7)
    steps = [mix.rows(step) for step in range(2 * count // 7 + 1)]
    rows = sum(steps, [])
    first = mix.first_epoch * count
    assert first >= 40 * 2, "40 steps of 2 prompts"
    assert count % 7 and {len(step) for step in steps} == {7}
    assert sorted(rows[:count]) == list(range(first, first + count)) != rows[:count]
    assert sorted(rows[count : 2 * count]) == list(range(first + count, first + 2 * count))
    assert mix_of(data, size=7).rows(5) == steps[5], "whatever came before"

    # Two processes divide a step, without a sample twice.
    monkeypatch.setattr(supervised_mix_module, "process_count", lambda: 2)
    halves = []
    for index in (0, 1):
        monkeypatch.setattr(supervised_mix_module, "process_index", lambda index=index: index)
        halves += mix_of(data, size=8).rows(3)
    monkeypatch.undo()
    assert halves == mix_of(data, size=8).rows(3)


def test_a_steps_passes_add_up_to_stage_twos_loss(data, taught_policy):
    model = AutoModelForCausalLM.from_pretrained(taught_policy[3]).float()
    use_packed_attention(model)
    rows = data.samples.__getitems__(mix_of(data).rows(4))
    padded = InputMaskingDataCollator(data.tokenizer, mask_first_n_examples=1)(rows)
    expected = model(**padded).loss
    expected.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    for passes, parts in ((1, 1), (4, 4), (8, 6)):  # of 6 samples not more than 6
        model.zero_grad()
        mix = mix_of(data, passes=passes)
        found = [mix.loss(model, step, part, "cpu") for step in (4, 5) for part in range(passes)]
        here = [pair for pair in found[:passes] if pair is not None]
        assert len(here) == parts and found[:parts] == here
        total = sum(loss for loss, _ in here)
        assert [mean is None for _, mean in here] == [True] * (parts - 1) + [False]
        assert here[-1][1].item() == pytest.approx(expected.item(), rel=1e-5), "what is logged"
        assert total.item() == pytest.approx(expected.item(), rel=1e-5)
        total.backward()
        assert torch.allclose(model.get_input_embeddings().weight.grad, gradient, atol=1e-6)
        assert mix.rows(4) != mix.rows(5) and found[passes] is not None


def test_beside_the_policy(tmp_path, policy):
    records, weights, _ = trained(tmp_path / "whole", *policy, *STOPPED, *MIXED)
    alone, without, _ = trained(tmp_path / "alone", *policy, *STOPPED)
    assert all(r["supervised_loss"] > 0 for r in records) and not any("supervised_loss" in r for r in alone)
    # The first step starts from the same model: its loss is the policy's, and twice the other one.
    assert records[0]["loss"] == pytest.approx(alone[0]["loss"] + 2 * records[0]["supervised_loss"], abs=2e-4)
    assert any(not torch.allclose(tensor, without[part], atol=1e-3) for part, tensor in weights.items())
    for name, more in (
        ("in parts", ("--micro_batch_size", 8)),
        ("folded and compiled", ("--fold_lora", True, "--compile_layers", True)),
        ("made ahead", ("--dataloader_num_workers", 1)),
    ):
        others, same, _ = trained(tmp_path / name, *policy, *STOPPED, *MIXED, *more)
        for record, other in zip(records, others, strict=True):
            for figure in ("loss", "supervised_loss", "grad_norm"):
                assert other[figure] == pytest.approx(record[figure], rel=1e-3), (name, figure)
        for part, tensor in weights.items():
            assert torch.allclose(tensor, same[part], atol=1e-4), (name, part)


@pytest.mark.parametrize("sampled", [("--fast_rollouts", True), ("--fast_rollouts", False)], ids=["copy", "trl"])
def test_a_continued_run_learns_what_an_uninterrupted_one_does(tmp_path, policy, monkeypatch, sampled):
    flags = (*policy, *MIXED, *sampled, "--micro_batch_size", 8, "--save_steps", 1)
    records, weights, printed = trained(tmp_path / "whole", *flags)
    assert "a step: 2 forward passes of 8 completions, without padding" in printed, "prompts are shared, unasked"
    assert all(r["supervised_loss"] > 0 for r in records)

    whole = SupervisedMix.loss

    def stopped_in_the_second(self, model, step, *more):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return whole(self, model, step, *more)

    monkeypatch.setattr(SupervisedMix, "loss", stopped_in_the_second)
    code, printed = call("train_grpo", *flags, "--output_dir", tmp_path / "stopped")
    assert code == 143 and "checkpoint-2" in printed, printed
    monkeypatch.undo()
    # Beside it: this process, which goes on, has the folder to itself.
    shutil.copytree(tmp_path / "stopped", tmp_path / "continued", ignore=shutil.ignore_patterns(".*"))
    others, same, printed = trained(tmp_path / "continued", *flags)
    assert "checkpoint-2" in printed
    assert others[-1]["supervised_loss"] == records[-1]["supervised_loss"]
    for part, tensor in weights.items():
        assert torch.equal(tensor, same[part]), part


def test_completions_that_are_all_of_one_length(tmp_path, taught_policy):
    flags = (*SMALL, *taught_policy, "--max_steps", 1, "--shared_prompts", True)
    for name in ("copy", "trl"):
        records, _, _ = trained(tmp_path / name, *flags, "--fast_rollouts", name == "copy")
        assert len(records) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--supervised_weight", -1), "supervised_weight is -1.0: expected a number from 0"),
        (("--supervised_batch_size", 0), "supervised_batch_size is 0: expected a whole number from 1"),
        (("--shared_prompts", False), "shared_prompts is False: expected not false beside --supervised_weight"),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_what_is_refused(tmp_path, policy, more, says):
    code, printed = call("train_grpo", *policy, *MIXED, *more, "--output_dir", tmp_path)
    assert code == 2 and says in printed, printed


def test_the_memory_that_is_tried_has_the_samples_besides(data, taught_policy):
    model = add_lora(AutoModelForCausalLM.from_pretrained(taught_policy[3]).float(), PRECISION, r=4)
    use_packed_attention(model)
    settings = train_grpo.Settings(
        num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=2, lora_r=4, max_seq_length=160,
        max_steps=3, supervised_weight=1.0, supervised_batch_size=6, stop_at_error=True, reward_cells=0.0,
    )  # fmt: skip
    run = SimpleNamespace(settings=settings, precision=PRECISION)
    trial = PolicyTrial(model, run, data, 6, from_copy=False, mix=SupervisedMix(run, data))
    longest = int(data.samples.lengths().max())
    assert trial.longest(8)[2]["input_ids"].numel() == -(-3 * longest // 8) * 8, "half of a step's six"
    prompts, replies, more = trial.typical(16)[0]
    assert int((more["position_ids"] == 0).sum()) == 6
    alone = trial.loss((prompts, replies, None)).item()
    seen = []
    model.register_forward_pre_hook(lambda model, args, keywords: seen.append(sorted(keywords)), with_kwargs=True)
    both = trial.loss((prompts, replies, more)).item()
    trial.mix.loss(model, 0, 0, "cpu")
    assert seen[1] == seen[2], "compiled layers are compiled anew for other keywords"
    assert both == pytest.approx(alone + model(**more).loss.item(), rel=1e-5) != alone


def test_what_makes_batches_can_be_sent_to_processes_that_are_no_forks(data):
    dataset = lazy_dataset(PromptRows(data), 4)
    again = pickle.loads(pickle.dumps(dataset))
    assert [row["key"] for row in again] == [row["key"] for row in dataset] and len(again) == 4
    mix = pickle.loads(pickle.dumps(mix_of(data, passes=2).divide)).__self__
    assert [len(part["input_ids"]) for part in mix.divide(data.samples.__getitems__(mix.rows(0)))] == [1, 1]


def test_its_processes_end_with_the_training_wherever_that_stops(tmp_path, policy, monkeypatch):
    class StopsAfterTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    made, begin = [], SupervisedMix.__init__
    monkeypatch.setattr(SupervisedMix, "__init__", lambda self, *args: (made.append(self), begin(self, *args))[1])
    monkeypatch.setattr("arc.training.callbacks.Plan", lambda run: StopsAfterTwo())
    records, _, _ = trained(tmp_path, *policy, *STOPPED, *MIXED, "--dataloader_num_workers", 1, "--max_steps", 9)
    assert [record["supervised_loss"] > 0 for record in records] == [True, True]
    assert made[0]._steps is None and not multiprocessing.active_children()


def test_a_run_that_is_stopped_ends_with_the_processes_that_make_its_batches(tmp_path, policy):
    flags = (*policy, *STOPPED, *MIXED, "--dataloader_num_workers", 2, "--max_steps", 500, "--logging_steps", 1)
    process = Script("train_grpo.py", *flags, "--output_dir", tmp_path, fresh=True)
    wait_for_step(artifact(tmp_path, "Final-RL-checkpoints"), 2, process)
    process.send_signal(signal.SIGTERM)  # to it alone: they leave signals to it, sent to a whole group or not
    assert process.wait(60) == 143, process.printed()
