"""What keeps a run's work: signals, saves by time, NaN, marks of complete checkpoints, messages, what a run needs.

Real trainings of a tiny Llama; signals and limits are given to processes of their own.
"""

import contextlib
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from arc.runs import guard_callback
from arc.runs import signals as signals_module
from arc.runs.checkpoints import MARKER, complete_checkpoints, delete_older, mark_complete, refuse_pickles
from arc.runs.guard import generation_steps, guard
from arc.runs.needs import Free, Need, count_weights, disk_needs, find_shortages, memory_needs, read_free
from arc.runs.signals import StopSignals
from arc.runs.troubles import NonFiniteError, explain, machine_errors
from tests.helpers import ROOT

NEVER = 10**6  # save_steps that are not reached: only the last step saves by itself


def tiny_model(hidden=16, layers=1, tied=True, vocabulary=32, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=64,
    ))  # fmt: skip


def tiny_trainer(folder, callbacks=(), model=None, rows=None, **arguments):
    """A LoRA training with dropout, so that the state of the random generators counts too."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model or tiny_model(),
        LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "up_proj"], modules_to_save=["embed_tokens"],
                   ensure_weight_tying=True, task_type="CAUSAL_LM"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (rows or 64, 8), generator=generator)
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 5, "seed": 1,
        "save_strategy": "steps", "save_steps": NEVER,
    }  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(
        model=model, args=TrainingArguments(**{**options, **arguments}), train_dataset=data, eval_dataset=data,
        callbacks=list(callbacks),
    )  # fmt: skip


class AtStep(TrainerCallback):
    """Does something when a step ends."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def weights(checkpoint):
    return load_file(Path(checkpoint) / "adapter_model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(folder):
    return sorted((path.name for path in Path(folder).glob("checkpoint-*")), key=lambda name: int(name[11:]))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last checkpoint of a training without any guard."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny_trainer(folder).train()
    assert checkpoints(folder) == ["checkpoint-10"]
    return folder / "checkpoint-10"


# ---------------------------------------------------------------------------------------------------------------------
# Saving by time, and where it may


def test_saving_by_time_changes_nothing_and_every_checkpoint_continues_to_the_same_end(tmp_path, uninterrupted):
    trainer = tiny_trainer(tmp_path)
    guard(trainer, signals=StopSignals(), save_seconds=0.0)  # after every step
    trainer.train()
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in range(1, 11)]
    assert [path.name for path in complete_checkpoints(tmp_path)][:2] == ["checkpoint-10", "checkpoint-9"]
    assert same(tmp_path / "checkpoint-10", uninterrupted)
    for step in (1, 6):
        again = tiny_trainer(tmp_path / f"from-{step}")
        guard(again, signals=StopSignals(), save_seconds=None)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert checkpoints(tmp_path / f"from-{step}") == ["checkpoint-10"]
        assert same(tmp_path / f"from-{step}" / "checkpoint-10", uninterrupted)


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_save_is_due_when_the_time_has_passed_and_at_the_last_step(tmp_path, monkeypatch, strategy):
    clock = [0.0]
    monkeypatch.setattr(guard_callback, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock[0] += 90.0  # seconds a step

        def on_save(self, args, state, control, **kwargs):
            clock[0] += 200.0  # seconds to write a checkpoint: no time of work

    trainer = tiny_trainer(tmp_path, [Clock()], save_strategy=strategy)
    guard(trainer, signals=StopSignals(), save_seconds=300.0)
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]


@pytest.mark.parametrize(
    ("options", "multiple", "expected"),
    [
        ({"save_steps": 4}, 1, [4, 8, 10]),
        ({"save_steps": 2}, 3, [3, 6, 9, 10]),  # put off to the next multiple
        ({"save_steps": NEVER}, 3, [10]),
        ({"save_strategy": "no"}, 1, []),
    ],
)
def test_the_trainers_own_saves_are_kept_to_the_multiple(tmp_path, options, multiple, expected):
    trainer = tiny_trainer(tmp_path, **options)
    guard(trainer, signals=StopSignals(), save_seconds=None, steps_between_saves_multiple=multiple)
    trainer.train()
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in expected]
    assert len(complete_checkpoints(tmp_path)) == len(expected)


def test_saves_by_time_are_kept_to_the_multiple(tmp_path):
    trainer = tiny_trainer(tmp_path)
    guard(trainer, signals=StopSignals(), save_seconds=0.0, steps_between_saves_multiple=4)
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]


def test_older_checkpoints_go_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []

    def mark_and_look(folder):
        seen.append(([path.name for path in complete_checkpoints(tmp_path, quiet=True)], folder.name))
        mark_complete(folder)

    monkeypatch.setattr(guard_callback, "mark_complete", mark_and_look)
    (tmp_path / "checkpoint-1").mkdir()  # left by a run that was killed
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_text("half")
    (tmp_path / "checkpoint-notes").mkdir()
    trainer = tiny_trainer(tmp_path, save_steps=3)
    guard(trainer, signals=StopSignals(), save_seconds=None, keep=1)
    trainer.train()
    # Whenever one is marked, the one before it is still there, whole.
    assert seen == [
        ([], "checkpoint-3"), (["checkpoint-3"], "checkpoint-6"), (["checkpoint-6"], "checkpoint-9"),
        (["checkpoint-9"], "checkpoint-10"),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-notes"]


def test_parts_of_checkpoints_go_and_whole_ones_stay(tmp_path):
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_text("numbers")
        if step in (5, 15):
            mark_complete(folder)
    delete_older(tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-5", "checkpoint-15", "checkpoint-20"]  # the last one is written anew
    delete_older(tmp_path, keep=1)
    assert checkpoints(tmp_path) == ["checkpoint-15", "checkpoint-20"]


@pytest.mark.parametrize(
    ("per_generation", "iterations", "accumulation", "expected"),
    [(None, 1, 2, 1), (None, 4, 2, 4), (4, 1, 2, 2), (4, 2, 2, 4), (2, 1, 4, 1), (3, 1, 2, 3)],
)
def test_generation_steps_of_a_grpo_config(tmp_path, per_generation, iterations, accumulation, expected):
    from trl import GRPOConfig

    arguments = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation, num_iterations=iterations, num_generations=2, bf16=False, use_cpu=True,
    )  # fmt: skip
    assert generation_steps(arguments) == expected
    forward_passes = arguments.steps_per_generation * iterations
    assert expected * accumulation % forward_passes == 0  # a generation begins where a step ends
    assert generation_steps(TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=2)) == 1


class Ends(TrainerCallback):
    """Ends the training at an event of a step, as any callback may."""

    def __init__(self, event, step):
        def end(args, state, control, **kwargs):
            if state.global_step == step:
                control.should_training_stop = True

        setattr(self, event, end)


@pytest.mark.parametrize(
    ("event", "step", "options"),
    [
        ("on_step_end", 3, {}),
        ("on_log", 5, {}),
        ("on_evaluate", 3, {"eval_strategy": "steps", "eval_steps": 3}),
        ("on_save", 4, {"save_steps": 2}),
        ("on_epoch_end", 4, {"rows": 16}),
    ],
)
def test_a_training_that_a_callback_ended_is_recorded_as_ended(tmp_path, event, step, options):
    trainer = tiny_trainer(tmp_path, [Ends(event, step)], **options)
    guard(trainer, signals=StopSignals(), save_seconds=None, steps_between_saves_multiple=2)
    trainer.train()
    assert trainer.state.global_step == step
    newest, *older = complete_checkpoints(tmp_path)
    assert newest.name == f"checkpoint-{step}"
    ended = [json.loads((path / "trainer_state.json").read_text())["stateful_callbacks"] for path in (newest, *older)]
    assert ["run guard" in callbacks for callbacks in ended] == [True] + [False] * len(older)
    assert ended[0]["run guard"]["reason"] == f"a callback ended the training at step {step}"


def test_a_training_that_ran_to_its_end_or_stopped_on_a_signal_is_not_recorded_as_ended(tmp_path):
    with StopSignals() as signals:
        trainer = tiny_trainer(tmp_path / "signal", [AtStep(3, lambda: signal.raise_signal(signal.SIGTERM))])
        guard(trainer, signals=signals, save_seconds=3600.0)
        trainer.train()
    trainer = tiny_trainer(tmp_path / "whole")
    guard(trainer, signals=StopSignals(), save_seconds=3600.0)
    trainer.train()
    for folder, step in (("signal", 3), ("whole", 10)):
        [checkpoint] = complete_checkpoints(tmp_path / folder)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["global_step"] == step and "run guard" not in state["stateful_callbacks"]


# ---------------------------------------------------------------------------------------------------------------------
# Signals

# A training in a process of its own, each step of which is announced.
TRAINING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with interrupts ignored
sys.path.insert(0, {tests!r})
from tests.runs.test_checkpoints import *
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep({seconds})
with StopSignals() as signals:
    trainer = tiny_trainer(sys.argv[1], [Slow()], {options})
    guard(trainer, signals=signals, save_seconds=3600.0, steps_between_saves_multiple={multiple})
    trainer.train()
signals.end_if_received(sys.argv[1])
print("done", flush=True)
"""


@contextlib.contextmanager
def started(folder, seconds=0.2, multiple=1, options=""):
    text = TRAINING.format(tests=str(ROOT), seconds=seconds, multiple=multiple, options=options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", text, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process, line):
    for got in process.stdout:
        if got.strip() == line:
            return
    raise AssertionError(f"never came to {line!r}: {process.stderr.read()[-3000:]}")


def test_sigterm_stops_with_a_checkpoint_and_the_run_goes_on_to_the_same_end(tmp_path, uninterrupted):
    with started(tmp_path, multiple=4, options="dataloader_num_workers=1") as process:
        wait_for(process, "step 2")
        # Twice in a row, as `timeout` does it, to the whole group; and an interrupt to it, as a terminal does.
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors.count("SIGTERM: stopping after this step, with a checkpoint; once more: at once") == 1
    assert "the same command continues from" in errors and "Traceback" not in errors
    assert "done" not in printed
    [checkpoint] = complete_checkpoints(tmp_path)
    assert checkpoint.name == "checkpoint-4"  # the next multiple
    again = tiny_trainer(tmp_path)
    guard(again, signals=StopSignals(), save_seconds=3600.0)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(tmp_path / "checkpoint-10", uninterrupted)


WAITING = """
import signal, time
from arc.runs.signals import StopSignals
signal.signal(signal.SIGINT, signal.default_int_handler)
with StopSignals():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_acts_at_once(second, code):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("SIGINT: stopping after this step, with a checkpoint; once more")
        process.send_signal(second)  # a copy of the first, it seems
        time.sleep(signals_module.SAME_SIGNAL + 0.2)
        assert process.poll() is None
        process.send_signal(second)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert ("KeyboardInterrupt" in errors) == (second == signal.SIGINT)


def test_handlers_are_restored_and_ignored_signals_stay_ignored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGINT) == signals._handle
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    StopSignals().end_if_received("nothing")  # does nothing


def test_outside_of_the_main_thread_signals_are_left_alone():
    before, entered = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignals() as signals:
            entered.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [(None, before)]


def test_with_checkpoints_off_a_signal_stops_without_one_and_skips_the_measurement(tmp_path, capfd):
    with StopSignals() as signals:
        trainer = tiny_trainer(tmp_path, [AtStep(3, lambda: signal.raise_signal(signal.SIGTERM))], save_strategy="no")
        guard(trainer, signals=signals, save_seconds=None, steps_between_saves_multiple=4)
        trainer.train()
    assert trainer.state.global_step == 3 and checkpoints(tmp_path) == []
    with pytest.raises(SystemExit) as stop:
        signals.end_if_received(tmp_path)
    assert stop.value.code == 143
    errors = capfd.readouterr().err
    assert "without a checkpoint (they are off)" in errors and "no checkpoint was written" in errors


# ---------------------------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize(
    ("logging_steps", "save_seconds", "what", "step"),
    [(100, 0.0, "weights are not finite", 2), (1, 3600.0, "the loss is nan", 3)],
)
def test_training_that_turns_into_nan_is_stopped_before_it_is_saved(tmp_path, logging_steps, save_seconds, what, step):
    # Steps of 1e30: after one, the weights are still numbers; after two they are not, and then no loss is.
    trainer = tiny_trainer(
        tmp_path, learning_rate=1e30, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=logging_steps
    )
    guard(trainer, signals=StopSignals(), save_seconds=save_seconds)
    with pytest.raises(NonFiniteError, match=f"{what}.* after step {step}") as caught:
        trainer.train()
    assert caught.value.step == step
    assert checkpoints(tmp_path) == (["checkpoint-1"] if save_seconds == 0 else [])
    for checkpoint in complete_checkpoints(tmp_path):
        assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


def test_without_checkpoints_nan_is_found_at_the_end(tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=1e38, max_steps=4, logging_steps=100, save_strategy="no")
    guard(trainer, signals=StopSignals(), save_seconds=None)
    with pytest.raises(NonFiniteError, match="after step 4"):
        trainer.train()


def test_the_trainer_alone_would_hide_the_loss(tmp_path):
    # What guard switches off: the premise of its check of logged losses.
    trainer = tiny_trainer(tmp_path, learning_rate=1e38, max_steps=4, logging_steps=1, save_strategy="no")
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert all(map(math.isfinite, losses))


def test_an_infinite_gradient_alone_is_no_error(tmp_path):
    # As float16's loss scaling meets in its first steps, which it skips.
    trainer = tiny_trainer(tmp_path, max_steps=2)
    guard(trainer, signals=StopSignals(), save_seconds=None)
    trainer.train()
    trainer.log({"loss": 1.0, "grad_norm": math.inf})
    with pytest.raises(NonFiniteError, match="the loss is nan after step 2"):
        trainer.log({"loss": math.nan, "grad_norm": 1.0})


# ---------------------------------------------------------------------------------------------------------------------
# Complete checkpoints


def test_only_whole_checkpoints_count(tmp_path, capsys):
    for step in (5, 9, 10, 20, 30, 40):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(b"x" * 100)
        (folder / "inner" / "state.json").write_text("{}")
        mark_complete(folder)
    assert json.loads((tmp_path / "checkpoint-5" / MARKER).read_text()) == {"inner/state.json": 2, "optimizer.pt": 100}
    (tmp_path / "checkpoint-20" / MARKER).unlink()
    (tmp_path / "checkpoint-30" / "optimizer.pt").write_bytes(b"x" * 99)
    (tmp_path / "checkpoint-40" / "inner" / "state.json").unlink()
    (tmp_path / "checkpoint-5" / MARKER).write_text("[")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-10", tmp_path / "checkpoint-9"]
    assert capsys.readouterr().out.splitlines() == [
        "note: checkpoint-5, checkpoint-20, checkpoint-30, checkpoint-40 are not whole (killed while it was written or "
        "deleted): not used"
    ]
    complete_checkpoints(tmp_path, quiet=True)
    complete_checkpoints(tmp_path / "nothing")
    assert capsys.readouterr().out == ""


def test_a_marker_does_not_outlive_the_files_that_it_is_of(tmp_path):
    # A checkpoint that is written again is not whole until it is marked again.
    trainer = tiny_trainer(tmp_path, max_steps=1)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "old").write_text("x")
    mark_complete(folder)
    guard(trainer, signals=StopSignals(), save_seconds=None)
    there = []
    save, trainer._save_checkpoint = (
        trainer._save_checkpoint,
        lambda *a: (there.append((folder / MARKER).exists()), save(*a)),
    )
    trainer.train()
    assert there == [False] and complete_checkpoints(tmp_path) == [folder]


# ---------------------------------------------------------------------------------------------------------------------
# Planted pickles in a checkpoint


class Command:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin", "scaler.pt"]
)
def test_a_planted_pickle_in_a_checkpoint_is_not_loaded_by_a_continued_run(tmp_path, uninterrupted, name, form):
    checkpoint, ran = tmp_path / "checkpoint-5", tmp_path / "ran"
    shutil.copytree(uninterrupted, checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": 5}))
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    if form == "plain":
        (checkpoint / name).write_bytes(pickle.dumps(Command(ran)))
    else:
        torch.save(Command(ran), checkpoint / name)
    if name.endswith((".pt", ".pth")):
        with pytest.raises(ValueError, match=f"{name} holds more than tensors"):
            refuse_pickles(checkpoint)
    else:
        refuse_pickles(checkpoint)
    trainer = tiny_trainer(tmp_path, max_steps=6)
    if name == "training_args.bin":  # written for people, never read
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        # Nothing scales losses on a CPU; on CUDA in float16 the file is read in the same way as the scheduler's.
        with pytest.raises((pickle.UnpicklingError, AttributeError)):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not ran.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Trouble of the machine

SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": False,
    "max_seq_length": 1536, "lora_r": 512, "per_device_eval_batch_size": 8, "learning_rate": 1e-4,
    "max_grad_norm": 1.0, "dtype": "bfloat16",
}  # fmt: skip


def exact_match():
    torch.empty(2**55, dtype=torch.uint8)


def real_errors():
    """Errors of memory and disk that this machine really raises, by name."""
    import numpy as np

    raised = {}
    for name, action in {
        "torch": lambda: torch.empty(2**55, dtype=torch.uint8),
        "numpy": lambda: np.empty(2**55, dtype=np.uint8),
        "python": lambda: b"x" * 2**55,
        "measuring": exact_match,
    }.items():
        try:
            action()
        except (RuntimeError, MemoryError) as error:
            raised[name] = error
    return raised


def test_out_of_memory_names_what_to_lower_in_order_with_the_present_values(tmp_path):
    errors = real_errors()
    assert set(errors) == {"torch", "numpy", "python", "measuring"}
    errors["cuda"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    errors["cublas"] = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    measuring = explain(errors.pop("measuring"), "training", SETTINGS, tmp_path)
    assert "while measuring held-out puzzles" in measuring and "--per_device_eval_batch_size (now 8)" in measuring
    assert "micro_batch" not in measuring
    for error in errors.values():
        text = explain(error, "training", {**SETTINGS, "num_generations": 8}, tmp_path)
        assert text.startswith("out of memory while training")
        expected = (
            "--micro_batch_size 2 (now 4): the same result",
            "--gradient_checkpointing true (now false)", "--max_seq_length (now 1536)", "--num_generations (now 8)",
            "--lora_r (now 512)",
        )  # fmt: skip
        places = [text.index(words) for words in expected]
        assert places == sorted(places)
    chosen = explain(errors["cuda"], "training", {**SETTINGS, "micro_batch_size": 3}, tmp_path)
    assert "--micro_batch_size 1 (now 3)" in chosen
    little = explain(
        errors["cuda"], "training", {"per_device_train_batch_size": 1, "gradient_checkpointing": True}, tmp_path
    )
    assert "--" not in little and "End what else uses the memory" in little
    assert "--" not in explain(errors["cuda"], "merging", {}, tmp_path)


def test_numbers_workers_and_everything_else(tmp_path):
    error = NonFiniteError("the loss is nan", 40)
    text = explain(error, "training", SETTINGS, tmp_path)
    assert "the loss is nan after step 40" in text and "float16" not in text
    assert "--learning_rate (now 0.0001) or --max_grad_norm (now 1.0)" in text
    first = explain(NonFiniteError("the model answers with NaN", 0), "training", SETTINGS, tmp_path)
    assert "it is the model that the training starts from" in first and "--learning_rate" not in first
    assert "--dtype bfloat16" in explain(error, "training", {**SETTINGS, "dtype": "float16"}, tmp_path)
    killed = RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")
    assert "--dataloader_num_workers (now 4)" in explain(killed, "training", {"dataloader_num_workers": 4}, tmp_path)
    others = (
        ValueError("x"), RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "No such file"), KeyError("x"),
        ZeroDivisionError(), OSError("no number"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        Exception("No such file or directory (os error 2)"), KeyboardInterrupt(),
    )  # fmt: skip
    for other in others:
        assert explain(other, "training", SETTINGS, tmp_path) is None
        with pytest.raises(type(other)) as caught, machine_errors("training", SETTINGS, folder=tmp_path):
            raise other
        assert caught.value is other


def test_the_message_goes_to_stderr_with_exit_code_1_and_names_what_is_safe(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ARC_TRACEBACK", raising=False)
    (tmp_path / "Base-lora").mkdir()
    artifacts = [tmp_path / "Base-lora", tmp_path / "Base-merged"]

    def fail(newest):
        with machine_errors(
            "training", SETTINGS, folder=tmp_path, checkpoint=lambda: newest, artifacts=artifacts
        ):  # fmt: skip
            raise NonFiniteError("the loss is nan", 40)

    for newest in (tmp_path / "checkpoint-30", None):
        with pytest.raises(SystemExit) as stop:
            fail(newest)
        assert stop.value.code == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: the loss is nan after step 40")
        assert f"Finished, and not touched: {artifacts[0]}." in printed.err
        said = f"The last good checkpoint is {newest}." if newest else "No checkpoint was written before."
        assert said in printed.err
    monkeypatch.setenv("ARC_TRACEBACK", "1")
    with pytest.raises(NonFiniteError):
        fail(None)


# Trainings whose second checkpoint does not fit: from then on no file may be larger than so many bytes.
FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from tests.runs.test_checkpoints import *
def limit_files(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for limit in {limits}:
    folder = Path(sys.argv[1]) / str(limit)
    trainer = tiny_trainer(folder, [AtStep(6, lambda: limit_files(limit))], save_steps=4)
    guard(trainer, signals=StopSignals(), save_seconds=None, keep=1)
    newest = lambda: (complete_checkpoints(folder) or [None])[0]
    try:
        with machine_errors("training", SETTINGS, folder=folder, checkpoint=newest, artifacts=[folder.parent]):
            trainer.train()
    except SystemExit as stop:
        print("ended with", stop.code, flush=True)
    limit_files(resource.RLIM_INFINITY)
"""


def test_a_full_disk_while_a_checkpoint_is_written_costs_only_that_checkpoint(tmp_path, uninterrupted):
    sizes = {path.name: path.stat().st_size for path in uninterrupted.iterdir()}
    # The first limit fails in peft or safetensors, the second one later, in torch.save.
    limits = (500, 12000)
    assert 500 < sizes["adapter_model.safetensors"] < 12000 < sizes["optimizer.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("ARC_TRACEBACK", None)
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(tests=str(ROOT), limits=limits), str(tmp_path)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("ended with 1\n") == 2
    assert done.stdout.count("note: checkpoint-8 is not whole") == 2
    for limit, message in zip(limits, done.stderr.split("error: cannot write ")[1:], strict=True):
        folder = tmp_path / str(limit)
        assert "while training (" in message and "GiB free: make room" in message
        assert f"The last good checkpoint is {folder / 'checkpoint-4'}." in message
        assert f"Finished, and not touched: {tmp_path}." in message
        # It does serve: the run goes on from it to the end that it would have had.
        again = tiny_trainer(folder, save_steps=4)
        guard(again, signals=StopSignals(), save_seconds=None)
        again.train(resume_from_checkpoint=str(complete_checkpoints(folder)[0]))
        assert same(folder / "checkpoint-10", uninterrupted)
        assert [path.name for path in complete_checkpoints(folder)] == [f"checkpoint-{n}" for n in (10, 8, 4)]


@contextlib.contextmanager
def not_root():
    """The rights of a user who owns nothing here."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed_folder():
    """A folder that may be read and not written to, where other users can reach it."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "work"
        folder.mkdir(mode=0o555)
        yield folder


def test_a_folder_that_may_not_be_written_to_is_named(closed_folder):
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    folder = closed_folder
    tensor = {"a": torch.zeros(3)}
    writers = {
        "python": lambda: (folder / "x.json").write_text("x"),
        "mkdir": lambda: (folder / "checkpoint-1").mkdir(),
        "torch": lambda: torch.save(tensor, folder / "x.pt"),
        "safetensors": lambda: save_file(tensor, folder / "x.safetensors"),
        "tokenizers": lambda: Tokenizer(models.BPE()).save(str(folder / "x.json")),
    }
    for name, write in writers.items():
        error = None
        with not_root():
            try:
                write()
            except Exception as raised:  # noqa: BLE001 - tokenizers raises no narrower one
                error = raised
        if error is None and os.geteuid() == 0:
            pytest.skip("this root may write everywhere")
        text = explain(error, "training", SETTINGS, folder)
        assert text is not None, (name, error)
        assert "cannot write" in text and str(folder) in text and "who owns" in text, name


# ---------------------------------------------------------------------------------------------------------------------
# What a run needs

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def within(count, actual, share=0.1):
    return abs(count - actual) <= share * actual


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embeddings", [["embed_tokens", "lm_head"], ["lm_head"], []], ids=["both", "head", "none"])
def test_counts_are_the_sizes_of_real_files(tmp_path, optim, tied, embeddings):
    from arc.models.loading import Precision
    from arc.models.lora import add_lora

    size = {"hidden": 256, "layers": 2, "tied": tied, "vocabulary": 500}
    base = tiny_model(**size)
    config = base.config
    targets = [*TARGETS, *embeddings]
    model = add_lora(
        base, Precision("transformers", "float32", False), target_modules=targets, r=32, gradient_checkpointing=False
    )
    counts = count_weights(config, target_modules=targets, r=32)
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.model == sum(p.numel() for p in tiny_model(**size).parameters())
    tokens = torch.randint(0, 500, (2, 8), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=model, train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, optim=optim, report_to=[],
                               save_strategy="steps", disable_tqdm=True),
    )  # fmt: skip
    guard(trainer, signals=StopSignals(), save_seconds=None)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    needs = disk_needs(counts, optim=optim, checkpoints=2, prepared=True).parts
    assert list(needs) == ["prepared base", "3 checkpoints", "adapter", "merged model"]
    adapter = (checkpoint / "adapter_model.safetensors").stat().st_size
    whole = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert within(needs["adapter"], adapter, 0.02), needs["adapter"] / adapter
    assert within(needs["3 checkpoints"] / 3, whole), needs["3 checkpoints"] / 3 / whole
    merged = trainer.model.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(tmp_path / "merged")
    actual = sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert within(needs["merged model"], actual), needs["merged model"] / actual
    assert needs["prepared base"] == needs["merged model"]


def test_what_is_there_already_or_not_wanted_needs_no_room():
    counts = count_weights(tiny_model().config, target_modules=TARGETS, r=4)
    one = disk_needs(counts, optim="adamw_torch", checkpoints=2, checkpoints_there=2).parts
    assert "1 checkpoint" in one
    best = disk_needs(counts, optim="adamw_torch", checkpoints=2, best=3).parts
    assert best["best adapters"] == 3 * 4 * counts.trained
    assert set(disk_needs(counts, optim="adamw_torch", checkpoints=0, adapter=False).parts) == {"merged model"}
    assert set(disk_needs(counts, optim="adamw_torch", checkpoints=0, merged=False).parts) == {"adapter"}


def test_memory_of_the_published_recipe_in_figures():
    # Llama-3.2-1B: 16 layers of 60.8M weights in linear layers, a tied embedding of 2,048 for each token.
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, pad_token_id=128004,
    )  # fmt: skip
    counts = count_weights(config, target_modules=[*TARGETS, "embed_tokens", "lm_head"], r=512, vocabulary=79)
    assert counts.linear == 16 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * 2048 * 8192)
    assert (counts.embeddings, counts.full_embeddings, counts.full_head) == (79 * 2048, 79 * 2048, 0)
    assert counts.lora == 16 * 512 * (2 * 4096 + 2 * 2560 + 3 * 10240)
    assert config.vocab_size == 128256  # not changed
    recipe = {"engine": "unsloth", "dtype": "bfloat16", "load_in_4bit": True, "optim": "adamw_8bit"}
    training, merging = memory_needs(counts, **recipe)
    assert training.parts["frozen weights"] == pytest.approx(0.516 * counts.linear, rel=0.01)
    assert training.parts["trained weights"] == training.parts["their gradients"] == 4 * counts.trained
    assert training.parts["optimizer"] == pytest.approx(2.03 * counts.trained, rel=0.01)
    assert merging.total == 4 * (counts.model + counts.trained)
    assert training.remedies == ("a lower --lora_r (now 512)", "--target_modules without embed_tokens and lm_head")
    wide, _ = memory_needs(counts, **{**recipe, "load_in_4bit": False, "optim": "adamw_torch"})
    assert wide.parts["frozen weights"] == pytest.approx(2 * counts.linear, rel=0.01)
    assert wide.parts["optimizer"] == 8 * counts.trained
    assert wide.remedies[:2] == ("--load_in_4bit true", "--optim adamw_8bit (now adamw_torch)")
    assert memory_needs(counts, **recipe, training=False) == [merging]


def test_shortages_are_lines_with_figures_and_what_helps():
    needs = [
        Need("training", "memory", {"frozen weights": 3 * 2**30, "optimizer": 2**30}, ("--optim adamw_8bit",)),
        Need("writing", "disk", {"adapter": 50 * 2**20}, ("make room",)),
    ]
    assert find_shortages(needs, Free(2**40, 2**40, "output", "GPU memory")) == []
    assert find_shortages(needs, Free(50 * 2**20, 4 * 2**30, "output", "GPU memory")) == []  # exactly enough
    memory, disk = find_shortages(needs, Free(2**20, 2**30, "output", "GPU memory"))
    assert memory == (
        "training needs at least 4.0 GiB of GPU memory (frozen weights 3.0 GiB, optimizer 1.0 GiB), 1.0 GiB are free; "
        "what helps, best first: --optim adamw_8bit"
    )
    assert disk.startswith("writing needs at least 50.0 MiB on the disk of output (adapter 50.0 MiB), 1.0 MiB are free")


def test_what_is_free_is_read_for_a_folder_that_is_not_there_yet(tmp_path):
    free = read_free(tmp_path / "a" / "b")
    assert free.place == str(tmp_path) and 0 < free.disk <= shutil.disk_usage(tmp_path).total
    assert free.memory > 2**20
    assert free.memory_name == ("GPU memory" if torch.cuda.is_available() else "main memory")
    assert not (tmp_path / "a").exists()


def test_processes_that_make_batches_end_with_one_that_fails():
    program = """
import multiprocessing, torch
from arc.runs.workers import leaving_signals
batches = iter(torch.utils.data.DataLoader(range(99), num_workers=8, worker_init_fn=leaving_signals()))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()))
raise ValueError("nothing catches this")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "nothing catches this" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr  # that they were killed is no error
    workers = done.stdout.split()
    assert len(workers) == 8 and not any(Path("/proc", worker).exists() for worker in workers)
