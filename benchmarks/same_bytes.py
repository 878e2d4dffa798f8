"""Whether two versions of the code make the same artifacts, by the three stages and an evaluation of each.

    python benchmarks/same_bytes.py --before COMMIT

Checks COMMIT out beside this checkout and runs both on this machine with the demo's base and a small generated dataset,
once with the plain settings and once with the options of CHAINS. Compares every safetensors file of the seven folders
byte for byte, and results.json but for times and paths. Then this checkout runs the same commands on the other one's
folders: it must find everything finished and train nothing. Prints a line for each comparison; exit code 1 if one
fails.

Only for changes that are meant to change no numbers. Both versions run in the environment that starts this script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "--engine transformers --sizes 3 --max_seq_length 320 --holdout_examples 40 --lora_r 16 --learning_rate 3e-4 "
    "--logging_steps 2 --eval_puzzles 8 --save_steps 4 --gradient_checkpointing false"
)
SUPERVISED = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_steps 8 --eval_steps 4"
POLICY = (
    "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --num_generations 4 --max_steps 4 --eval_steps 2"
)
# Flags of stages 1, 2 and 3. The options reach code that the plain settings leave out.
CHAINS = {
    "plain": (SUPERVISED, SUPERVISED, POLICY),
    "options": (
        f"{SUPERVISED} --optim muon --load_in_4bit true --perm_share 0.5 --merge_base original",
        f"{SUPERVISED} --fold_lora true --load_in_4bit false",
        f"{POLICY} --supervised_weight 1.5 --supervised_batch_size 4 --fast_rollouts true --shared_prompts true "
        "--load_in_4bit false",
    ),
}
SCRIPTS = ("base_finetune.py", "base_finetune_final.py", "train_grpo.py")
FOLDERS = ("prepared", *(f"{name}-{kind}" for name in ("Base", "Final", "Final-RL") for kind in ("lora", "merged")))
EVALUATION = "--sizes 3 --holdout_examples 40 --views 4 --max_new_tokens 60 --max_seq_length 512"
VARYING = ("seconds", "time", "path", "version", "created", "date", "commit", "cache", "command", "machine")


def run(checkout: Path, script: str, *flags: object) -> str:
    """Run a script of a checkout; return what it printed."""
    command = [sys.executable, str(checkout / script), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "ARC_LOADER_CACHE": "off"}
    done = subprocess.run(
        command, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{checkout.name}/{script} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def run_chain(checkout: Path, data: Path, out: Path, stages: tuple[str, ...]) -> str:
    """The three stages and the evaluation of their models; returns what all of them printed."""
    text = ""
    for script, flags in zip(SCRIPTS, stages, strict=True):
        base = ("--base_model", checkout / "demo" / "base") if script == SCRIPTS[0] else ()
        text += run(
            checkout, script, *COMMON.split(), *flags.split(), *base, "--dataset_dir", data, "--output_dir", out
        )
    models = [out / f"Llama-3.2-1B-{name}" for name in ("prepared", "Base-merged", "Final-RL-merged")]
    flags = ("--dataset_dir", data, "--output_dir", out / "evaluation", "--models", *models)
    return text + run(checkout, "evaluate_arc.py", *EVALUATION.split(), *flags)


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file of the seven folders."""
    files = [path for name in FOLDERS for path in sorted((out / f"Llama-3.2-1B-{name}").glob("*.safetensors"))]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_times(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {
            key: without_times(entry)
            for key, entry in value.items()
            if not any(word in key.lower() for word in VARYING)
        }
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def results(out: Path) -> Any:
    """The results of the evaluation, without times and with this run's folder named alike."""
    text = (out / "evaluation" / "results.json").read_text(encoding="utf-8")
    return without_times(json.loads(text.replace(str(out), "OUT")))


def main() -> None:
    """Run both versions and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="commit to compare this checkout with")
    parser.add_argument("--chains", nargs="+", choices=CHAINS, default=list(CHAINS))
    args = parser.parse_args()
    failed = False

    def report(what: str, same: bool, more: str = "") -> None:
        nonlocal failed
        failed |= not same
        print(f"{'same' if same else 'DIFFERENT'}: {what} {more}".rstrip(), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        # Both outputs lie at places of one length, so that recorded paths do not move bytes.
        before, data = Path(folder) / "checkout", Path(folder) / "data"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", before, args.before], check=True)
        try:
            run(before, "demo/make_dataset.py", "--out", data, "--families", "flip", "crop", "--examples", 120)
            for name in args.chains:
                outs = [Path(folder) / f"{name}-{version}" for version in ("before", "after_")]
                for checkout, out in zip((before, ROOT), outs, strict=True):
                    run_chain(checkout, data, out, CHAINS[name])
                one, other = map(weights, outs)
                changed = sorted(file for file in one.keys() | other.keys() if one.get(file) != other.get(file))
                report(
                    f"{name}: {len(one)} safetensors files of {len(FOLDERS)} folders", not changed, ", ".join(changed)
                )
                report(f"{name}: results.json", results(outs[0]) == results(outs[1]))
                printed = run_chain(ROOT, data, outs[0], CHAINS[name])
                skipped = printed.count("training skipped")
                same = skipped == len(SCRIPTS) and weights(outs[0]) == one
                report(
                    f"{name}: folders made before are complete after",
                    same,
                    f"{skipped} of {len(SCRIPTS)} trainings skipped",
                )
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
