"""Merge an adapter into its base, and prove the merge.

    python -m arc.merging output/Llama-3.2-1B-Base-lora output/Llama-3.2-1B-Base-merged

proves that a merged model belongs to an adapter, and prints one line. If it does not, the command says what differs and
ends with code 1. The stages call `merge_and_check`, which merges first.

Three things are proved, see arc/merging/proof.py. Every weight is base + adapter, rounded once. The model that plain
transformers loads from the disk answers as base + adapter does. The tokenizer is the adapter's. The line also compares
the merge with the model as it was trained, by the probe that was recorded when the training ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arc.decoding.log_probabilities import full_float32
from arc.merging.plan import load_merge_base, merge_device, plan_merge
from arc.merging.proof import check_merge, describe_check
from arc.models.cards import write_model_card
from arc.models.loading import Precision
from arc.models.lora import load_adapter
from arc.models.manifests import absolute_reference, apply_umask, read_manifest
from arc.models.vocabulary import load_tokenizer
from arc.models.weights import MergeError, saved_dtype

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "arc.merging")

# ---------------------------------------------------------------------------------------------------------------------
# Merging


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base and write a standalone 16-bit model.

    The sum is made in float32 and rounded once. `quantised`: onto the base as the adapter was trained on it, that is
    4-bit weights dequantised (what training saw, so the merge behaves as the trained model did). `original`: onto the
    16-bit base. An adapter that was trained on a 16-bit base gives the same either way.

    Args:
        adapter: a `-lora` folder.
        out: an existing folder, written into.
        base: the 16-bit base folder; default: the one that the adapter names.
        merge_base: "quantised" or "original".
        precision: how the base was loaded in training; default: as the adapter's manifest says.

    Returns:
        What was done, for the manifest.

    Raises:
        ValueError: unknown `merge_base`, or an adapter that does not say how its base was loaded.
        FileNotFoundError: the adapter has no safetensors file.
    """
    import torch

    plan = plan_merge(adapter, base, merge_base, precision)
    model = load_merge_base(plan.base, plan.quantised, merge_device())
    # A 16-bit type as saved: the base's own, or float16 if that is what the arithmetic of the training was.
    float16 = plan.precision is not None and plan.precision.dtype == "float16"
    dtype = torch.float16 if float16 else saved_dtype(plan.base)
    with full_float32():
        merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    if merged.config.tie_word_embeddings:
        merged.tie_weights()
    merged = merged.to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(str(out))
    load_tokenizer(adapter).save_pretrained(str(out))
    onto = "quantised" if plan.quantised else "16-bit"
    done = {"merge_base": merge_base, "merged_onto": onto, "dtype": str(dtype)[6:]}
    write_model_card(out, {**read_manifest(adapter), **done, "base": absolute_reference(plan.base)})
    apply_umask(out)
    return done


def merge_and_check(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
    own_process: bool | None = None,
) -> dict[str, Any]:
    """Merge an adapter and prove the merge.

    Args:
        adapter, out, base, merge_base, precision: see `merge_adapter`.
        own_process: do it in a fresh process; default: where Unsloth is loaded in this one, since it changes the models
            that merge and proof want plain.

    Returns:
        What was done, as `merge_adapter` says it, and under "check" what `check_merge` gives.

    Raises:
        MergeError, ValueError, FileNotFoundError: as `merge_adapter` and `check_merge`, from whichever process.
    """
    options: dict[str, Any] = {"base": base, "merge_base": merge_base, "precision": precision}
    if "unsloth" in sys.modules if own_process is None else own_process:
        return _merge_in_own_process(adapter, out, **options)
    done = merge_adapter(adapter, out, **options)
    return {**done, "check": check_merge(adapter, out, **options)}


def _merge_in_own_process(
    adapter: str | Path, out: str | Path, *, base: str | Path | None, merge_base: str, precision: Precision | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [*COMMAND, str(adapter), str(out), "--merge_base", merge_base, "--merge", str(result)]
        command += ["--base", str(base)] if base else []
        command += ["--precision", json.dumps(asdict(precision))] if precision else []
        # The scripts are run from any folder: the process finds the package where this one did.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        # Line by line through this process, so that the output goes wherever this process's goes.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
        if not result.is_file():
            raise RuntimeError(f"the process that merges {adapter} ended with {process.returncode} and no result")
        done = json.loads(result.read_text(encoding="utf-8"))
    if "error" in done:
        error = _PASSED_ON[done["error"]](done["message"])
        if isinstance(error, OSError) and done.get("errno") is not None:
            error.errno = done["errno"]
        raise error
    return done


# The first that an error is one of; of another kind only its message comes over.
_PASSED_ON = {
    kind.__name__: kind for kind in (MergeError, FileNotFoundError, ValueError, OSError, MemoryError, RuntimeError)
}


def _end_with_parent() -> None:
    # Whoever started this process holds the other end of its standard input: when that closes, nobody waits any more.
    def wait() -> None:
        # Not sys.stdin: its lock, held here, would keep the interpreter from ending in order.
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """The command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="a -lora folder")
    parser.add_argument("merged", type=Path, help="its -merged folder")
    parser.add_argument("--base", help="the base folder (default: the one that the adapter names)")
    parser.add_argument("--merge_base", choices=("quantised", "original"), help="default: as the merge's manifest says")
    parser.add_argument("--precision", help=argparse.SUPPRESS)  # as JSON
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)  # merge first; the file to write the result into
    args = parser.parse_args()
    options = {
        "base": args.base,
        "merge_base": args.merge_base or read_manifest(args.merged).get("merge_base") or "quantised",
        "precision": Precision(**json.loads(args.precision)) if args.precision else None,
    }
    try:
        if args.merge:
            _end_with_parent()
            result = merge_and_check(args.adapter, args.merged, **options, own_process=False)
            args.merge.write_text(json.dumps(result), encoding="utf-8")
        else:
            print(describe_check(check_merge(args.adapter, args.merged, **options)))
    except Exception as error:
        if args.merge:
            kind = next((name for name, kind in _PASSED_ON.items() if isinstance(error, kind)), "RuntimeError")
            passed = {"error": kind, "message": str(error), "errno": getattr(error, "errno", None)}
            args.merge.write_text(json.dumps(passed), encoding="utf-8")
            sys.exit(1)
        if not isinstance(error, (MergeError, ValueError, OSError)):
            raise
        sys.exit(str(error))
