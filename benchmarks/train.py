"""Training speed of stage 1: Unsloth's own recipe, ours on both engines, and a bare loop, on the same data in one run.

    python benchmarks/train.py --base_model MODEL --dataset_dir dataset --output_dir output-train

Each row is a process of its own, one after the other:

    stock         Unsloth as its own examples use it: 4 bits, 4 x 2 samples a step, its checkpointing, its trainer and
                  collator, rows tokenised before
    unsloth       stage 1 with its defaults: Unsloth, 4 bits
    transformers  stage 1 on the transformers engine, 16 bits; its layers compiled, as by default in a run of 10 minutes
    unsloth16     stage 1 on the Unsloth engine in 16 bits; only where --rows names it
    unsloth-casts-single
                  as unsloth, but each adapter is cast by itself, see adapter_casts; only where --rows names it
    bare          no trainer and no data: compiled layers on fixed full rows, the same LoRA and optimizer: what the
                  machine can do in practice

All but bare see the same samples in the same order. Tokens are real ones, without padding; times are those of the
steps after --warm_up, by marks that the device passes: it is not waited for, as in a training that logs seldom. Writes
benchmarks/results/train.json and a plot of the losses beside it. --profile prints where the time of three steps goes.
--ours adds flags to all rows of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ROWS = ("stock", "unsloth", "transformers", "bare")
MORE_ROWS = ("unsloth16", "unsloth-casts-single")
FLAGS = {
    "unsloth": ["--engine", "unsloth"],
    "transformers": ["--engine", "transformers", "--load_in_4bit", "false", "--compile_layers", "true"],
    "unsloth16": ["--engine", "unsloth", "--load_in_4bit", "false"],
    "unsloth-casts-single": ["--engine", "unsloth"],
}


class Clock:
    """When each step ended, how many tokens it had and what its loss was; all of it on the device until `result`."""

    def __init__(self) -> None:
        """See the class."""
        self.ends: list[Any] = []
        self.tokens: list[Any] = []
        self.losses: list[Any] = []

    def step(self, tokens: Any, loss: Any) -> None:
        """Note the end of a step: its tokens and loss, numbers or tensors of one."""
        import torch

        end: Any = time.perf_counter()
        if torch.cuda.is_available():
            end = torch.cuda.Event(enable_timing=True)
            end.record()
        self.ends.append(end)
        self.tokens.append(tokens)
        self.losses.append(loss)

    def result(self, name: str, warm_up: int) -> dict[str, Any]:
        """Tokens a second and milliseconds a step after the warm-up, peak memory, and the losses."""
        import torch

        first, last = self.ends[warm_up - 1], self.ends[-1]
        gib = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            seconds = first.elapsed_time(last) / 1000
            gib = torch.cuda.max_memory_allocated() / 2**30
        else:
            seconds = last - first
        tokens, steps = [int(count) for count in self.tokens], len(self.ends) - warm_up
        return {
            "name": name,
            "tokens_per_s": round(sum(tokens[warm_up:]) / seconds, 1),
            "step_ms": round(1000 * seconds / steps, 2),
            "peak_gib": None if gib is None else round(gib, 2),
            "steps": len(self.ends),
            "tokens_per_step": round(sum(tokens) / len(tokens), 1),
            "losses": [round(float(loss), 4) for loss in self.losses],
        }


def watch_steps(trainer: Any, clock: Clock) -> None:
    """Have a trainer's steps timed, their losses kept and their real tokens counted."""
    from transformers import TrainerCallback

    pad = trainer.processing_class.pad_token_id
    step = trainer.training_step
    seen: list[Any] = [0, 0.0]

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        seen[0] = seen[0] + (mask.sum() if mask is not None else (inputs["input_ids"] != pad).sum())
        loss = step(model, inputs, *args, **kwargs)
        seen[1] = seen[1] + loss
        return loss

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step(*seen)
            seen[:] = 0, 0.0

    trainer.training_step = counted
    trainer.add_callback(Watch())


@contextlib.contextmanager
def profiled(trainer: Any, first: int, asked: bool) -> Iterator[None]:
    """Print where three steps' time goes, from step `first` on."""
    import torch
    from transformers import TrainerCallback

    if not asked:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    class Profile(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == first:
                profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == first + 3:
                profiler.stop()

    trainer.add_callback(Profile())
    yield
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total",
                         row_limit=25, max_name_column_width=60))  # fmt: skip
    if torch.cuda.is_available():
        print(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))
        print_gaps(profiler.events())


def print_gaps(events: Any, lines: int = 15) -> None:
    """Print how long the device was busy in a profile, and before which kernels it waited longest."""
    from torch.autograd import DeviceType

    # Annotations, such as of an optimizer's step, span what they name and the gaps in it.
    done_there = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in done_there)
    if not spans:
        return
    busy, done, waits = 0.0, spans[0][0], {}
    for begin, end, name in spans:
        if begin > done:
            count, total = waits.get(name, (0, 0.0))
            waits[name] = (count + 1, total + begin - done)
        busy += max(0.0, end - max(begin, done))
        done = max(done, end)
    whole = done - spans[0][0]
    print(f"device: busy {busy / 1000:.1f} ms of {whole / 1000:.1f} ms in {len(spans):,} kernels and copies")
    for name, (count, total) in sorted(waits.items(), key=lambda item: -item[1][1])[:lines]:
        print(f"  idle {total / 1000:8.2f} ms in {count:5} waits for {name[:90]}")


def common_flags(args: argparse.Namespace) -> list[str]:
    """Flags of stage 1 for both rows of ours."""
    flags = {
        "base_model": args.base_model, "dataset_dir": args.dataset_dir, "output_dir": args.output_dir,
        "max_steps": args.steps, "eval_steps": 0, "save_steps": 0, "lora_r": args.lora_r,
        "max_seq_length": args.max_seq_length, "sizes": args.size, "holdout_examples": args.holdout_examples,
        "per_device_train_batch_size": args.samples_per_step // 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def make_stage_1(flags: list[str], cast_together: bool = True) -> tuple[Any, Any, Any]:
    """Stage 1 up to where its training begins: its run, data and trainer.

    Args:
        flags: of the stage.
        cast_together: see model_tools.add_lora.
    """
    import base_finetune
    from arc.models.collator import InputMaskingDataCollator
    from arc.models.loading import load_model
    from arc.models.lora import add_lora
    from arc.runs.settings import parse_settings
    from arc.training.data import load_data
    from arc.training.run import StageRun, lora_options
    from arc.training.trainer import sft_trainer

    settings = parse_settings(base_finetune.Settings, flags)
    run = StageRun(base_finetune.STAGE, settings)
    run.needs_training()
    data = load_data(run)
    run.begin(data)
    model, _ = load_model(run.parent, run.precision, settings.max_seq_length)
    model = add_lora(model, run.precision, **lora_options(settings), cast_together=cast_together)
    return run, data, sft_trainer(model, run, data, InputMaskingDataCollator(data.tokenizer, mask_inputs=False))


def run_ours(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Stage 1 up to the end of its training."""
    flags = [*common_flags(args), *FLAGS[name], *shlex.split(args.ours)]
    run, _, trainer = make_stage_1(flags, cast_together=name != "unsloth-casts-single")
    trainer.args.logging_nan_inf_filter = False  # as in a run of the stage, see arc.runs.guard: it waits twice a pass
    clock = Clock()
    watch_steps(trainer, clock)
    with profiled(trainer, args.warm_up, args.profile):
        trainer.train()
    estimated = round(1000 * run.plan.seconds_per_step, 2)
    return clock.result(name, args.warm_up) | {"estimated_step_ms": estimated, "batches": asdict(run.plan)}


def planned_samples(args: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenizer, and the samples of all steps in the order in which stage 1 takes them."""
    import base_finetune
    from arc.runs.settings import parse_settings
    from arc.training.data import load_data
    from arc.training.rows import EpochSampler
    from arc.training.run import StageRun

    settings = parse_settings(base_finetune.Settings, [*common_flags(args), "--engine", "transformers"])
    run = StageRun(base_finetune.STAGE, settings)
    run.needs_training()
    data = load_data(run)
    run.begin(data)
    order = list(EpochSampler(len(data.samples), settings.seed))[: args.steps * args.samples_per_step]
    return data.tokenizer, [data.samples[row]["input_ids"].tolist() for row in order]


def run_stock(args: argparse.Namespace) -> dict[str, Any]:
    """Unsloth's own recipe."""
    import torch
    from datasets import Dataset
    from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

    tokenizer, samples = planned_samples(args)
    prepared = Path(args.output_dir) / "Llama-3.2-1B-prepared"
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(prepared), max_seq_length=args.max_seq_length, dtype=None, load_in_4bit=True
    )
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=args.lora_r, target_modules=[*linear, "embed_tokens", "lm_head"], lora_alpha=24, lora_dropout=0,
        bias="none", use_gradient_checkpointing=True, random_state=42, use_rslora=True, loftq_config=None,
    )  # fmt: skip

    class InOrder(UnslothTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": samples}),
        args=UnslothTrainingArguments(
            output_dir=str(Path(args.output_dir) / "stock"), per_device_train_batch_size=args.samples_per_step // 2,
            gradient_accumulation_steps=2, max_steps=args.steps, learning_rate=1e-4, embedding_learning_rate=1e-5,
            lr_scheduler_type="cosine", warmup_steps=0.25, optim="adamw_8bit", weight_decay=0.0, max_grad_norm=1.0,
            bf16=torch.cuda.is_bf16_supported(), fp16=not torch.cuda.is_bf16_supported(), seed=42, logging_steps=10,
            save_strategy="no", report_to=[], max_length=args.max_seq_length, dataset_num_proc=1,
        ),
    )  # fmt: skip
    clock = Clock()
    watch_steps(trainer, clock)
    with profiled(trainer, args.warm_up, args.profile):
        trainer.train()
    return clock.result("stock", args.warm_up)


def run_bare(args: argparse.Namespace) -> dict[str, Any]:
    """Compiled layers on fixed full rows of 1,024 random tokens, as many as there are samples in a step."""
    import torch
    from transformers import TrainingArguments

    from arc.models.library_patches import let_run_ahead
    from arc.models.loading import load_model, resolve_precision
    from arc.models.lora import add_lora
    from arc.training.batch_planning import compile_layers
    from arc.training.optimizers import optimizer_with_embedding_rate

    planned_samples(args)  # prepares the base where it is not there
    cuda = torch.cuda.is_available()
    precision = resolve_precision("transformers", load_in_4bit=False)
    prepared = Path(args.output_dir) / "Llama-3.2-1B-prepared"
    model, _ = load_model(prepared, precision)
    model = add_lora(model, precision, r=args.lora_r, gradient_checkpointing=False)
    model.train()
    compile_layers(model)
    arguments = TrainingArguments(
        output_dir=str(Path(args.output_dir) / "bare"), learning_rate=1e-4, optim="adamw_8bit", use_cpu=not cuda
    )
    arguments.embedding_learning_rate = 1e-5
    optimizer = optimizer_with_embedding_rate(model, arguments)
    let_run_ahead(optimizer)
    width = min(1024, args.max_seq_length)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (args.samples_per_step, width)))
    ids = ids.to("cuda" if cuda else "cpu")
    clock = Clock()
    for _ in range(args.steps):
        with torch.autocast("cuda" if cuda else "cpu", precision.torch_dtype, enabled=precision.dtype != "float32"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step(ids.numel(), loss.detach())
    return clock.result("bare", args.warm_up)


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """The losses of the rows that train on the data, over each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        if row["name"] != "bare":
            axis.plot(range(1, len(row["losses"]) + 1), row["losses"], label=row["name"], linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table, ratios to the first row."""
    print(f"\n| row | tokens/s | to {rows[0]['name']} | step, ms | peak GiB | loss, mean of the last 10 steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        ratio = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        last = np.mean(row["losses"][-10:])
        print(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {ratio:.2f} x | {row['step_ms']:.1f} | {row['peak_gib']} "
            f"| {last:.4f} |"
        )


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Write what has been measured so far."""
    from arc.runs.artifacts import versions

    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/train.py --base_model MODEL --dataset_dir dataset"
    record = {"machine": machine(), "versions": versions(), "command": command, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """The device and the machine, in words."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{'one' if count == 1 else count} {torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    return f"{platform.machine()}, {os.cpu_count()} cores, no CUDA"


def main() -> None:
    """Run the rows, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", default="output-train")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *MORE_ROWS], default=list(ROWS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm_up", type=int, default=20, help="steps that are not timed")
    parser.add_argument("--samples_per_step", type=int, default=8, help="an even number")
    parser.add_argument("--lora_r", type=int, default=512)
    parser.add_argument("--max_seq_length", type=int, default=1536)
    parser.add_argument("--size", type=int, default=6, help="demonstrations of a puzzle")
    parser.add_argument("--holdout_examples", type=int, default=64)
    parser.add_argument("--ours", default="", help="further flags of both rows of ours, as one string")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "train.json")
    parser.add_argument("--row", choices=[*ROWS, *MORE_ROWS], help=argparse.SUPPRESS)  # in the process of one row
    args = parser.parse_args()
    if not 1 <= args.warm_up < args.steps:
        parser.error("--warm_up has to be from 1 to below --steps")
    if args.row:
        result = {"stock": run_stock, "bare": run_bare}.get(args.row, lambda a: run_ours(a.row, a))(args)
        print("RESULT " + json.dumps(result))
        return
    rows = []
    for name in args.rows:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--row", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.splitlines()
        found = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
        if args.profile or not found:
            print(f"== {name}\n" + "\n".join(line for line in lines[-120:] if not line.startswith("RESULT ")))
        if found:
            rows += found
            print(f"{name}: {found[0]['tokens_per_s']:,.0f} tokens/s", flush=True)
            write_results(rows, args.results)  # what is measured stays, whatever becomes of the next row
    if not rows:
        sys.exit("error: no row came to its end")
    print_rows(rows)
    plot_losses(rows, args.results.with_suffix(".png"))
    print(f"{machine()}; {args.results}")
    if len(rows) < len(args.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
