"""Reinforcement learning: completions and steps a second, Unsloth's own GRPO against stage 3, on the same prompts.

    python benchmarks/grpo.py --base_model MODEL --dataset_dir dataset --output_dir output-grpo

Rows, each a process of its own:

    generate   transformers' `generate` alone, --prompts x --generations rows at once, on the 16-bit model
    rollouts   the sampler of stage 3 alone, on the same prompts
    stock      Unsloth as its own examples use it: 4 bits, trl's GRPOTrainer as Unsloth patches it, 2 prompts a step
    ours       stage 3 with its defaults, but all prompts in one step

The first two sample --tokens tokens of each reply, whatever they are, and compare by tokens a second. The others stop
at an end token, which random weights choose now and then, and compare by completions a second: of whole steps,
sampling and update. The reward is a random number, so that there is something to learn. --ours adds flags to stage 3.
Writes benchmarks/results/grpo.json; in it "tokens_per_s" are tokens of completions over the whole step,
"rollout_tokens_per_s" over its sampling alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ROWS = ("generate", "rollouts", "stock", "ours")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def synchronise() -> float:
    """The time, once the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> float | None:
    """Most memory that was held on the device, GiB."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def stage_settings(args: argparse.Namespace, extra: list[str]) -> Any:
    """Settings of stage 3 for all rows."""
    import train_grpo
    from arc.runs.settings import parse_settings

    completions = args.prompts * args.generations
    flags = {
        "base_model": prepared(args), "dataset_dir": args.dataset_dir, "output_dir": args.output_dir,
        "max_steps": args.steps, "logging_steps": 1, "eval_steps": 0, "save_steps": 0, "lora_r": args.lora_r,
        "max_seq_length": args.max_seq_length, "sizes": args.size, "holdout_examples": args.holdout_examples,
        "num_generations": args.generations, "per_device_train_batch_size": completions,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return parse_settings(train_grpo.Settings, [*argv, *extra])


def prepared(args: argparse.Namespace) -> Path:
    """The base with its vocabulary cut, made where it is not there."""
    from arc.models.manifests import write_manifest
    from arc.models.prepared_base import prepare_base
    from arc.runs.artifacts import new_folder

    folder = Path(args.output_dir) / "Llama-3.2-1B-prepared"
    if not folder.exists():
        with new_folder(folder) as beside:
            write_manifest(beside, prepare_base(args.base_model, beside))
    return folder


def prompts_of(args: argparse.Namespace, tokenizer: Any, count: int) -> list[np.ndarray]:
    """Token ids of held-out prompts."""
    from arc.training.data import heldout_puzzles

    dataset, encoder = heldout_puzzles(stage_settings(args, ["--engine", "transformers"]), tokenizer)
    rows = encoder.encode(dataset, dataset.keys[:count], max_tokens=args.max_seq_length - args.tokens, reply=False)
    if len(rows) < count:
        sys.exit(f"error: {len(rows)} held-out puzzles for {count} prompts: raise --holdout_examples")
    return [row["input_ids"] for row in rows]


def run_rollouts(args: argparse.Namespace, ours: bool) -> list[dict[str, Any]]:
    """Sampling alone: transformers' generate, or the sampler of stage 3."""
    import torch

    from arc.decoding.device_sampling import DeviceSampler
    from arc.models.loading import load_model, resolve_precision

    precision = resolve_precision("transformers", load_in_4bit=False)
    model, tokenizer = load_model(prepared(args), precision)
    model.eval()
    prompts = [ids for ids in prompts_of(args, tokenizer, args.prompts) for _ in range(args.generations)]
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    rows = {
        "input_ids": torch.from_numpy(ids).to(model.device),
        "attention_mask": torch.from_numpy(mask).to(model.device),
    }

    def generate() -> int:
        with torch.inference_mode():
            out = model.generate(
                **rows, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return len(prompts) * (out.shape[1] - width)

    sampler = DeviceSampler(model, -1, max_new_tokens=args.tokens)  # no token ends a reply

    def sample() -> int:
        return sum(len(reply.tokens) for [reply] in sampler.sample(prompts, batch_size=len(prompts)))

    name, way = ("rollouts", sample) if ours else ("generate", generate)
    way()
    begin = synchronise()
    tokens = sum(way() for _ in range(args.repeats))
    seconds = synchronise() - begin
    return [{
        "name": name, "tokens_per_s": round(tokens / seconds, 1), "rollout_tokens_per_s": round(tokens / seconds, 1),
        "completions_per_s": round(len(prompts) * args.repeats / seconds, 2),
        "step_ms": round(1000 * seconds / args.repeats, 1), "peak_gib": peak(),
    }]  # fmt: skip


def timed(trainer: Any, completions: int, args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Train and time whole steps after the first two, and the sampling in them."""
    from transformers import TrainerCallback

    ends, sampling, tokens = [], [], []
    generate = trainer._generate

    def watched(prompts: list[Any], *more: Any, **named: Any) -> Any:
        begin = synchronise()
        out = generate(prompts, *more, **named)
        sampling.append(synchronise() - begin)
        tokens.append(sum(map(len, out[1])))
        return out

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(synchronise())

    trainer._generate = watched
    trainer.add_callback(Watch())
    trainer.train()
    first = min(2, len(ends) - 1)
    seconds, steps = ends[-1] - ends[first - 1], len(ends) - first
    return [{
        "name": name, "tokens_per_s": round(sum(tokens[first:]) / seconds, 1),
        "rollout_tokens_per_s": round(sum(tokens[first:]) / sum(sampling[first:]), 1),
        "completions_per_s": round(completions * steps / seconds, 2), "step_ms": round(1000 * seconds / steps, 1),
        "completions": completions, "sampling_share": round(sum(sampling[first:]) / seconds, 3), "peak_gib": peak(),
    }]  # fmt: skip


def random_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number for each completion that it alone decides: groups differ, so that there is something to learn."""
    return [float(np.random.default_rng(ids[:8]).random()) for ids in completion_ids]


def run_ours(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Stage 3 up to the end of its training."""
    import train_grpo
    from arc.grpo.trainer import grpo_trainer
    from arc.models.loading import load_model
    from arc.models.lora import add_lora
    from arc.training.data import load_data
    from arc.training.run import StageRun, lora_options

    settings = stage_settings(args, shlex.split(args.ours))
    run = StageRun(train_grpo.STAGE, settings)
    run.needs_training()
    data = load_data(run)
    run.begin(data)
    model, _ = load_model(run.parent, run.precision, settings.max_seq_length)
    model = add_lora(model, run.precision, **lora_options(settings))
    trainer = grpo_trainer(model, run, data, [random_reward], reward_weights=[1.0], max_completion_length=args.tokens)
    rows = timed(trainer, args.prompts * args.generations, args, "ours")
    return [row | ({"plan": run.plan.choice()} if run.plan else {}) for row in rows]


def run_stock(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Unsloth's own GRPO: two prompts a step, as much as its examples take."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(prepared(args)), max_seq_length=args.max_seq_length, dtype=None, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=args.lora_r, target_modules=LINEAR, lora_alpha=24, lora_dropout=0, bias="none",
        use_gradient_checkpointing=True, random_state=42, use_rslora=True, loftq_config=None,
    )  # fmt: skip
    prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts_of(args, tokenizer, 2 * args.steps)]
    completions = 2 * args.generations
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[random_reward],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=GRPOConfig(
            output_dir=str(Path(args.output_dir) / "stock"), per_device_train_batch_size=completions,
            gradient_accumulation_steps=1, num_generations=args.generations, max_completion_length=args.tokens,
            max_steps=args.steps, learning_rate=5e-6, optim="adamw_8bit", beta=0.0, temperature=1.0, report_to=[],
            bf16=torch.cuda.is_bf16_supported(), fp16=not torch.cuda.is_bf16_supported(), logging_steps=1,
            save_strategy="no", seed=42,
        ),
    )  # fmt: skip
    return timed(trainer, completions, args, "stock")


def main() -> None:
    """Run the rows, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", default="output-grpo")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=112, help="longest completion")
    parser.add_argument("--steps", type=int, default=8, help="of stock and ours; the first two are not timed")
    parser.add_argument("--repeats", type=int, default=2, help="of generate and rollouts, after one that is not timed")
    parser.add_argument("--lora_r", type=int, default=512)
    parser.add_argument("--max_seq_length", type=int, default=1536)
    parser.add_argument("--size", type=int, default=6, help="demonstrations of a puzzle")
    parser.add_argument("--holdout_examples", type=int, default=64)
    parser.add_argument("--ours", default="", help="further flags of stage 3, as one string")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "grpo.json")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # in the process of one row
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps has to be 3 or more: the first two are not timed")
    if args.row:
        ways = {"stock": run_stock, "ours": run_ours}
        found = ways[args.row](args) if args.row in ways else run_rollouts(args, args.row == "rollouts")
        print("RESULT " + json.dumps(found))
        return
    from arc.runs.artifacts import versions

    rows, failed = [], []
    for name in args.rows:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--row", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if found:
            rows += found[0]
            print(f"{name}: {found[0]}", flush=True)
        else:
            failed.append(name)
            print(f"== {name}\n" + "\n".join(done.stdout.splitlines()[-60:]))
    if not rows:
        sys.exit("error: no row came to its end")
    print("\n| row | rollout tokens/s | completions/s | step, ms | peak GiB |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['name']} | {row['rollout_tokens_per_s']:,.0f} | {row['completions_per_s']:.1f} | "
            f"{row.get('step_ms', '-')} | {row['peak_gib']} |"
        )
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"
    machine = f"{name}, {os.cpu_count()} CPU cores"
    args.results.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/grpo.py --base_model MODEL --dataset_dir dataset"
    record = {"machine": machine, "versions": versions(), "command": command, "rows": rows}
    args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{machine}; {args.results}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
