"""What a merge keeps of a trained adapter, and what is left of it where the next stage loads the merge in 4 bits.

    python benchmarks/merges.py --lora output/Llama-3.2-1B-Base-lora --dataset_dir dataset

Takes the adapter of any stage that was trained on a 4-bit base, merges it onto the quantised and onto the original
base, and measures on puzzles that were held out of its training: the loss of their last replies, the KL divergence to
the model as trained (4-bit base + adapter) over their tokens, and the share that one greedy guess solves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def wilson(solved: int, count: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson's score interval)."""
    z, p = 1.96, solved / count
    middle, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def reply_log_probabilities(model: Any, rows: list[dict[str, Any]], batch_size: int) -> tuple[Any, Any]:
    """Log probabilities (tokens, vocabulary) at the tokens of the rows' last replies, and those tokens (tokens,)."""
    import torch

    found, targets = [], []
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            width = max(len(row["input_ids"]) for row in part)
            ids = np.zeros((len(part), width), dtype=np.int64)
            for i, row in enumerate(part):  # padded on the right: no token sees what comes after it
                ids[i, : len(row["input_ids"])] = row["input_ids"]
            logits = model(torch.from_numpy(ids).to(model.device)).logits
            for i, row in enumerate(part):
                begin, end = row["reply_spans"][-1]
                found.append(torch.log_softmax(logits[i, begin - 1 : end - 1].double(), -1).float().cpu())
                targets.append(torch.from_numpy(ids[i, begin:end]))
    return torch.cat(found), torch.cat(targets)


def main() -> None:
    """Merge both ways, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument("--dataset_dir", help="default: the one that the adapter was trained on")
    parser.add_argument("--n", type=int, default=256, help="held-out puzzles (256)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--results", type=Path, default=Path("merges.json"))
    args = parser.parse_args()

    import dataclasses

    import torch

    from arc.decoding.greedy import exact_match
    from arc.merging import merge as merge_module
    from arc.models.loading import Precision, load_model
    from arc.models.lora import load_adapter
    from arc.models.manifests import read_manifest
    from arc.runs.artifacts import versions
    from arc.runs.settings import RunSettings
    from arc.training.data import heldout_puzzles

    manifest = read_manifest(args.lora)
    trained = Precision(**{**manifest["precision"], "engine": "transformers"})
    if not trained.load_in_4bit:
        sys.exit(f"{args.lora} was trained on a 16-bit base: there is only one merge")
    names = {field.name for field in dataclasses.fields(RunSettings)}
    settings = RunSettings(**{name: value for name, value in manifest["settings"].items() if name in names})
    settings.dataset_dir = args.dataset_dir or settings.dataset_dir
    base = manifest["base"]
    rows_of: dict[str, Any] = {}

    def measure(name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        model.eval()
        if not rows_of:
            heldout, encoder = heldout_puzzles(settings, tokenizer)
            keys = heldout.keys[: args.n]
            rows_of["dataset"] = heldout
            rows_of["rows"] = encoder.encode(heldout, keys, max_tokens=settings.max_seq_length)
            rows_of["prompts"] = encoder.encode(heldout, keys, max_tokens=settings.max_seq_length, reply=False)
        found, targets = reply_log_probabilities(model, rows_of["rows"], args.batch_size)
        rows_of.setdefault("as trained", found)
        reference = rows_of["as trained"].double()
        options = {"batch_size": args.batch_size}
        scores = exact_match(model, "transformers", tokenizer, rows_of["dataset"], rows_of["prompts"], **options)
        count = len(rows_of["prompts"])
        solved = round(scores["eval_exact_match"] * count)
        row = {
            "name": name,
            "loss": float(-found.gather(1, targets[:, None]).mean()),
            "kl_to_trained": float((reference.exp() * (reference - found.double())).sum(-1).mean()),
            "top1_as_trained": float((reference.argmax(-1) == found.argmax(-1)).float().mean()),
            "n": count,
            "exact_1": solved / count,
            "ci_1": wilson(solved, count),
        }
        print(json.dumps(row), flush=True)
        return row

    sixteen, rows, checks = dataclasses.replace(trained, load_in_4bit=False), [], {}
    model, tokenizer = load_model(base, trained)
    rows.append(measure("4-bit base, no adapter: before the stage", model, tokenizer))
    rows_of.pop("as trained")
    rows.insert(0, measure("4-bit base + adapter: as trained", load_adapter(model, args.lora), tokenizer))
    reference, before = rows_of["as trained"].double(), rows[1]
    del model, before["kl_to_trained"], before["top1_as_trained"]
    assert reference.ndim == 2
    with tempfile.TemporaryDirectory(dir=args.lora.parent) as folder:
        for merge_base in ("quantised", "original"):
            merged = Path(folder) / merge_base
            merged.mkdir()
            done = merge_module.merge_and_check(args.lora, merged, base=base, merge_base=merge_base)
            checks[merge_base] = done.get("check", done)
            for precision in (sixteen, trained):
                model, tokenizer = load_model(merged, precision)
                bits = "in 4 bits, as a next stage does" if precision.load_in_4bit else "in 16 bits"
                rows.append(measure(f"merged onto the {merge_base} base, loaded {bits}", model, tokenizer))
                del model
    cuda = torch.cuda.is_available()
    result = {
        "machine": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "adapter": {name: manifest.get(name) for name in ("stage", "settings", "precision", "made")},
        "checks": checks,
        "rows": rows,
    }
    args.results.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    print("\n| model | solved (95% interval) | loss of replies | KL to the model as trained | same first choice |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["ci_1"]
        kl, same = row.get("kl_to_trained"), row.get("top1_as_trained")
        apart = f"{kl:.2g} | {same:.2%}" if kl is not None else "|"
        print(f"| {row['name']} | {row['exact_1']:.1%} ({low:.1%} to {high:.1%}) | {row['loss']:.4f} | {apart} |")


if __name__ == "__main__":
    main()
