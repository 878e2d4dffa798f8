"""The three stages end to end on one machine, checked and measured.

    python benchmarks/pipeline.py --base_model MODEL --dataset_dir dataset --output_dir output

Runs the scripts as a user does, then again (everything must be skipped), loads every -merged with plain transformers
and every -lora with plain peft, compares base + adapter as the manifest says with what the trained model answered,
counts how much of the trained embedding moved, and repeats a few steps of stage 1 in float16. Further flags go to all
three scripts. Writes --results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STAGES = (("base_finetune.py", "Base"), ("base_finetune_final.py", "Final"), ("train_grpo.py", "Final-RL"))
PREFIX = "Llama-3.2-1B"


def run_script(script: str, flags: list[str], log: Path) -> tuple[str, float]:
    """Run a stage as a user does; returns what it printed and the seconds it took."""
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *flags]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    printed = log.read_text(encoding="utf-8", errors="replace")
    if code:
        sys.exit(f"{script} {' '.join(flags)} failed with {code}:\n{printed[-6000:]}")
    return printed, time.perf_counter() - begin


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def moved_share(output: Path, dataset_dir: str) -> dict[str, Any]:
    """Share of the elements of stage 1's trained embedding that moved, in the rows whose tokens occur in the data."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from arc.models.vocabulary import load_tokenizer
    from arc.puzzles.dataset import ArcDataset
    from arc.puzzles.encoding import SampleEncoder
    from arc.puzzles.text import format_options

    before = load_file(output / f"{PREFIX}-prepared" / "model.safetensors")["model.embed_tokens.weight"].float()
    state = load_file(output / f"{PREFIX}-Base-lora" / "adapter_model.safetensors")
    after = next(v for name, v in state.items() if name.endswith("embed_tokens.weight"))
    tokenizer = load_tokenizer(output / f"{PREFIX}-prepared")
    data = ArcDataset.load_from_local_json(dataset_dir)
    rows = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token)).encode(data, data.keys[:512])
    seen = torch.from_numpy(np.unique(np.concatenate([row["input_ids"] for row in rows])).astype(np.int64))
    moved = float((after[seen] != before[seen]).float().mean())
    return {"dtype": str(after.dtype), "rows": len(seen), "moved": moved}


def check_artifacts(output: Path, name: str) -> dict[str, Any]:
    """Load one stage's folders with plain libraries.

    Returns:
        What the script's own proof of the merge found (from the manifest), and under `reloaded_kl` and `reloaded_top1`
        how near base and adapter, loaded by transformers and peft as the manifest says, come to what the trained model
        answered when the training ended: KL divergence in nats a token, and the share of equal first choices.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    from arc.merging.probe import probe_answers, read_probe
    from arc.merging.proof import compare_with_trained
    from arc.models.loading import Precision, load_model
    from arc.models.manifests import read_manifest

    lora, merged = output / f"{PREFIX}-{name}-lora", output / f"{PREFIX}-{name}-merged"
    device = {"": "cuda" if torch.cuda.is_available() else "cpu"}
    base = PeftConfig.from_pretrained(lora).base_model_name_or_path
    for model in (
        AutoModelForCausalLM.from_pretrained(merged, dtype="auto", device_map=device),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, device_map=device), lora),
    ):
        with torch.no_grad():
            logits = model(torch.arange(32, device=model.device)[None] % 60).logits
        if not torch.isfinite(logits).all():
            sys.exit(f"{name}: logits that are not finite")
    trained = Precision(**{**read_manifest(lora)["precision"], "engine": "transformers"})
    model = PeftModel.from_pretrained(load_model(base, trained)[0], lora).eval()
    probe = read_probe(lora)
    if probe is None:
        sys.exit(f"{lora} has no probe: nothing to compare with")
    near = compare_with_trained(model, probe_answers(model, probe), probe)
    checked = read_manifest(merged)["check"]
    return {**checked, "reloaded_kl": near["trained_kl"], "reloaded_top1": near["trained_top1"]}


def main() -> None:
    """Run, check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--dataset_dir", default="dataset")
    parser.add_argument("--output_dir", default="output")
    parser.add_argument("--steps", type=int, default=60, help="steps of stages 1 and 2")
    parser.add_argument("--grpo_steps", type=int, default=5)
    parser.add_argument("--fp16_steps", type=int, default=10, help="0: no float16 run")
    parser.add_argument("--results", type=Path, default=Path("pipeline.json"))
    args, more = parser.parse_known_args()

    import torch

    from arc.runs.artifacts import versions

    output, logs = Path(args.output_dir), args.results.parent
    logs.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "rows": [],
    }
    shared = ["--dataset_dir", args.dataset_dir, "--logging_steps", "5", *more]
    for script, name in STAGES:
        flags = [*shared, "--output_dir", args.output_dir]
        flags += ["--max_steps", str(args.grpo_steps), "--logging_steps", "1"] if name == "Final-RL" else []
        flags += ["--max_steps", str(args.steps)] if name != "Final-RL" else []
        flags += ["--base_model", args.base_model] if name == "Base" else []
        printed, seconds = run_script(script, flags, logs / f"{name}.log")
        records = read_lines(output / f"{PREFIX}-{name}-lora" / "metrics.jsonl")
        speeds = [r["tokens_per_s"] for r in records if "tokens_per_s" in r][2:]  # the first ones include compilation
        again, second = run_script(script, flags, logs / f"{name}-again.log")
        peak = [line.split("peak GPU memory ")[1].split(" ")[0] for line in printed.splitlines() if "peak GPU" in line]
        row = {
            "name": name,
            "seconds": round(seconds, 1),
            "seconds_when_done": round(second, 1),
            "skipped_when_done": "training skipped" in again and "merge skipped" in again,
            "losses": [r["loss"] for r in records if "loss" in r],
            "tokens_per_s": sorted(speeds)[len(speeds) // 2] if speeds else None,
            "peak_gib": float(peak[-1]) if peak else None,
        }
        result["rows"].append(row)
        print(row, flush=True)
        args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    result["folders"] = sorted(p.name for p in output.iterdir() if p.is_dir() and not p.name.endswith("-checkpoints"))
    result["merges"] = {name: check_artifacts(output, name) for _, name in STAGES}
    result["embedding"] = moved_share(output, args.dataset_dir)
    result["float16_losses"] = []
    if args.fp16_steps:
        fp16 = f"{args.output_dir}-fp16"
        flags = [*shared, "--output_dir", fp16, "--dtype", "float16", "--max_steps", str(args.fp16_steps)]
        flags += ["--base_model", args.base_model, "--logging_steps", "1"]
        run_script("base_finetune.py", flags, logs / "fp16.log")
        records = read_lines(Path(fp16) / f"{PREFIX}-Base-lora" / "metrics.jsonl")
        result["float16_losses"] = [r["loss"] for r in records if "loss" in r]
    args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("folders", "merges", "embedding", "float16_losses")}))

    losses = [x for row in result["rows"] for x in row["losses"]] + result["float16_losses"]
    checks = {
        "seven folders": len(result["folders"]) == 7,
        "a second run skips everything": all(row["skipped_when_done"] for row in result["rows"]),
        "finite losses": bool(losses) and all(x is not None and math.isfinite(x) for x in losses),
        "99% of the embedding moved": result["embedding"]["moved"] >= 0.99,
    }
    for what, good in checks.items():
        print(f"{'passed' if good else 'FAILED'}: {what}")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
