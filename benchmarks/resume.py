"""A run of stage 1 that is killed and continued, beside one that is not.

    python benchmarks/resume.py --base_model MODEL --dataset_dir dataset --output_dir output-resume

Runs base_finetune.py twice for --steps steps: to its end, and killed (SIGKILL) when --kill_at steps are logged, then
started again by the same command. Prints the losses of both side by side, the largest difference of a weight, and what
the check of the merge said; then merges the adapter onto the original base as well. Further flags go to the script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PREFIX = "Llama-3.2-1B"


def last_step(work: Path) -> int:
    """The last step in the log of a run, 0 if there is none."""
    try:
        lines = (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:  # half a line: it is being written
            pass
    return max(steps, default=0)


def start(flags: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start stage 1 in a process group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "base_finetune.py"), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a run to end well."""
    if process.wait():
        sys.exit(f"stage 1 failed:\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}")


def losses(output: Path) -> dict[int, float]:
    """Loss by step as the finished adapter's log has it."""
    text = (output / f"{PREFIX}-Base-lora" / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def lines_with(log: Path, *words: str) -> list[str]:
    """Lines of a log that hold any of the words."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if any(word in line for word in words)]


def main() -> None:
    """Run, kill, continue, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--dataset_dir", default="dataset")
    parser.add_argument("--output_dir", type=Path, default=Path("output-resume"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save_steps", type=int, default=10)
    parser.add_argument("--kill_at", type=int, default=15)
    parser.add_argument("--results", type=Path, default=Path("resume.json"))
    args, more = parser.parse_known_args()

    import torch
    from safetensors.torch import load_file

    from arc.models.manifests import read_manifest
    from arc.runs.artifacts import versions

    args.output_dir.mkdir(parents=True)
    flags = ["--base_model", args.base_model, "--dataset_dir", args.dataset_dir, "--max_steps", str(args.steps)]
    flags += ["--save_steps", str(args.save_steps), "--logging_steps", "1", "--eval_steps", "0", *more]
    whole, killed = args.output_dir / "whole", args.output_dir / "killed"
    log, begin = args.output_dir / "whole.log", time.perf_counter()
    finish(start([*flags, "--output_dir", str(whole)], log), log)
    seconds = {"whole": time.perf_counter() - begin}
    print(f"uninterrupted: {seconds['whole']:.0f} s", flush=True)

    log, begin = args.output_dir / "killed.log", time.perf_counter()
    process = start([*flags, "--output_dir", str(killed)], log)
    while process.poll() is None and last_step(killed / f"{PREFIX}-Base-checkpoints") < args.kill_at:
        time.sleep(0.02)
    if process.poll() is not None:
        sys.exit("the run ended before it could be killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = last_step(killed / f"{PREFIX}-Base-checkpoints")
    seconds["until killed"] = time.perf_counter() - begin
    print(f"killed after step {killed_at}", flush=True)
    begin = time.perf_counter()
    finish(start([*flags, "--output_dir", str(killed)], log), log)
    seconds["continued"] = time.perf_counter() - begin

    curves = losses(whole), losses(killed)
    states = [load_file(o / f"{PREFIX}-Base-lora" / "adapter_model.safetensors") for o in (whole, killed)]
    difference = max(float((states[0][name].float() - states[1][name].float()).abs().max()) for name in states[0])
    largest = max(float(tensor.float().abs().max()) for tensor in states[0].values())
    print("| step | uninterrupted | killed and continued |\n| --- | --- | --- |")
    for step in sorted(curves[0]):
        print(f"| {step} | {curves[0][step]:.6f} | {curves[1].get(step, float('nan')):.6f} |")
    print(f"largest difference of a weight: {difference:.2g} (largest weight {largest:.2g})")
    print("\n".join(lines_with(log, "continuing from", "merge proven", "is not whole")))

    # The same adapter merged onto the original base.
    original = args.output_dir / "original"
    for name in ("prepared", "Base-lora"):
        shutil.copytree(whole / f"{PREFIX}-{name}", original / f"{PREFIX}-{name}")
    log = args.output_dir / "original.log"
    finish(start([*flags, "--output_dir", str(original), "--merge_base", "original"], log), log)
    checks: dict[str, Any] = {}
    for name, output in (("quantised", whole), ("original", original)):
        checks[name] = read_manifest(output / f"{PREFIX}-Base-merged").get("check")
        print(f"--merge_base {name}: " + " ".join(lines_with(args.output_dir / f"{output.name}.log", "merge proven")))
    result = {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "seconds": seconds,
        "killed_at": killed_at,
        "losses": {"uninterrupted": curves[0], "continued": curves[1]},
        "largest_difference": difference,
        "largest_weight": largest,
        "checks": checks,
    }
    args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
