"""The three stages end to end on one machine, checked and measured.

    python benchmarks/pipeline.py --base_model MODEL --dataset_dir dataset --output_dir output

Runs the scripts as a user does, then again (everything must be skipped), loads every -merged with plain transformers
and every -lora with plain peft, counts how much of the trained embedding moved, compares each merge with the model as
trained, and repeats a few steps of stage 1 in float16. Further flags go to all three scripts. Writes --results.
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

    from arc_loader import ArcDataset, format_options
    from arc_samples import SampleEncoder
    from model_tools import load_tokenizer

    before = load_file(output / f"{PREFIX}-prepared" / "model.safetensors")["model.embed_tokens.weight"].float()
    state = load_file(output / f"{PREFIX}-Base-lora" / "adapter_model.safetensors")
    after = next(v for name, v in state.items() if name.endswith("embed_tokens.weight"))
    tokenizer = load_tokenizer(output / f"{PREFIX}-prepared")
    data = ArcDataset.load_from_local_json(dataset_dir)
    rows = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token)).encode(data, data.keys[:512])
    seen = torch.from_numpy(np.unique(np.concatenate([row["input_ids"] for row in rows])).astype(np.int64))
    moved = float((after[seen] != before[seen]).float().mean())
    return {"dtype": str(after.dtype), "rows": len(seen), "moved": moved}


def probe_ids(tokenizer: Any) -> Any:
    """Token ids (1, tokens) of a text in the puzzles' format, the same in every process."""
    text = "".join(f"I{i}12\n3{i}4\n+/-=O4{i}\n1{i}\n{tokenizer.eos_token}" for i in range(9))
    return tokenizer(text, return_tensors="pt")["input_ids"]


def save_trained_logits(lora: Path, out: Path) -> None:
    """Load base and adapter as in training, by the engine that trained them, and save the log probabilities.

    Runs in a process of its own: Unsloth changes the libraries that the other checks use plain.
    """
    import model_tools
    from training_tools import import_unsloth

    precision = model_tools.Precision(**model_tools.read_manifest(lora)["precision"])
    if precision.engine == "unsloth":
        import_unsloth()
    import torch

    model, tokenizer = model_tools.load_model(model_tools.read_manifest(lora)["base"], precision)
    model = model_tools.load_adapter(model, lora).eval()
    with torch.no_grad():
        logits = model(probe_ids(tokenizer).to(model.device)).logits
    torch.save(torch.log_softmax(logits.double(), -1).cpu(), out)


def check_artifacts(output: Path, name: str, logs: Path) -> dict[str, float]:
    """Load one stage's folders with plain libraries and compare both merges with the model as trained.

    Returns:
        KL divergence in nats a token, on one text, of each merge base's merge to base and adapter as trained:
        `kl_quantised`, `kl_original` with the base loaded by transformers, `kl_engine` by the engine that trained.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    import model_tools

    lora, merged = output / f"{PREFIX}-{name}-lora", output / f"{PREFIX}-{name}-merged"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = model_tools.load_tokenizer(merged)
    ids = probe_ids(tokenizer).to(device)

    def logits(model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            found = torch.log_softmax(model(ids).logits.double(), -1)
        if not torch.isfinite(found).all():
            sys.exit(f"{name}: logits that are not finite")
        return found

    base = PeftConfig.from_pretrained(lora).base_model_name_or_path
    plain = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, device_map={"": device}))
    logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, device_map={"": device}), lora))
    recorded = model_tools.read_manifest(lora)["precision"]
    as_trained = model_tools.Precision(**{**recorded, "engine": "transformers"})
    trained = logits(model_tools.load_adapter(model_tools.load_model(base, as_trained)[0], lora))
    original = output / f"{PREFIX}-{name}-original"
    if not original.exists():
        original.mkdir()
        model_tools.merge_adapter(lora, original, merge_base="original")
    other = logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32, device_map={"": device}))

    saved = logs / f"{name}-logits.pt"
    command = [sys.executable, __file__, "--save_logits", str(lora), "--results", str(saved)]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"{name}: the engine that trained the adapter could not load it")
    by_engine = torch.load(saved, weights_only=True).to(device)

    def apart(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    return {
        "kl_quantised": apart(trained, plain),
        "kl_original": apart(trained, other),
        "kl_engine": apart(by_engine, plain),
    }


def main() -> None:
    """Run, check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model")
    parser.add_argument("--dataset_dir", default="dataset")
    parser.add_argument("--output_dir", default="output")
    parser.add_argument("--steps", type=int, default=60, help="steps of stages 1 and 2")
    parser.add_argument("--grpo_steps", type=int, default=5)
    parser.add_argument("--fp16_steps", type=int, default=10, help="0: no float16 run")
    parser.add_argument("--save_logits", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("pipeline.json"))
    args, more = parser.parse_known_args()
    if args.save_logits:
        save_trained_logits(args.save_logits, args.results)
        return
    if not args.base_model:
        parser.error("--base_model is needed")

    import torch

    from training_tools import versions

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
    result["folders"] = sorted(
        p.name for p in output.iterdir() if p.is_dir() and not p.name.endswith(("-checkpoints", "-original"))
    )
    result["merges"] = {name: check_artifacts(output, name, logs) for _, name in STAGES}
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
