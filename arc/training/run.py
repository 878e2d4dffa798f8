"""One run of a stage: begin, train, save, merge. Heavy libraries are imported inside functions, Unsloth first."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from arc.decoding.rows import NonFiniteAnswersError
from arc.merging.merge import merge_and_check
from arc.merging.probe import PROBE, make_probe_rows, record_probe
from arc.merging.proof import describe_check
from arc.models.lora import save_adapter
from arc.models.manifests import read_manifest, write_manifest
from arc.models.prepared_base import prepare_base
from arc.models.weights import MergeError
from arc.runs.artifacts import INCOMPLETE, Stage, file_table, move_aside, new_folder, provenance, versions
from arc.runs.checkpoints import complete_checkpoints, delete_older, refuse_pickles
from arc.runs.freshness import find_parent, made_from
from arc.runs.guard import generation_steps, guard
from arc.runs.lock import OutputLock
from arc.runs.needs import count_weights, disk_needs, find_shortages, format_duration, memory_needs, read_free
from arc.runs.processes import fail, is_main, leave, process_count, wait_for_everyone
from arc.runs.settings import RunSettings, user_errors
from arc.runs.signals import StopSignals
from arc.runs.troubles import NonFiniteError, machine_errors
from arc.training.arguments import check_arguments
from arc.training.data import StageData
from arc.training.existing import check_course, is_merged, is_trained, where_the_parent_is, write_course
from arc.training.stage import S, StageContext

SAVE_SECONDS = 300.0  # of training between checkpoints, unless --save_steps is set
PROBE_ROWS = 64  # held-out puzzles on which the merge is compared with the trained model
NO_PROBABILITIES = "probability tensor contains"  # torch.multinomial says so of NaN; on CUDA an assert ends the process


class StageRun(StageContext[S]):
    """One run of a stage: begin, train, save, merge. What is decided about it is its `StageContext`."""

    def __init__(self, stage: Stage, settings: S):
        """Look at what exists, without writing; a user's mistake ends the program with one message."""
        self.lock = OutputLock(Path(settings.output_dir), stage.script)
        with user_errors():
            super().__init__(stage, settings)
            if is_trained(self):
                print(f"{self.lora} is there: training skipped")
                return
            if self.precision.engine == "unsloth":
                import_unsloth()
            check_arguments(self)
            parent = find_parent(stage, settings, without_prepared=stage.prepared(settings) in self.to_move)
            self.starts_from, base = parent, settings.base_model
            if stage.parent == "prepared" and base and parent == (Path(base) if Path(base).is_dir() else base):
                self.to_prepare = stage.prepared(settings)
            four_bit = ", base in 4 bits" if self.precision.load_in_4bit else ""
            several = f", {process_count()} processes" if process_count() > 1 else ""
            engine, dtype = self.precision.engine, self.precision.dtype
            print(f"{stage.script}: {parent} -> {self.lora} ({engine}, {dtype}{four_bit}{several})")
            print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
            if self.precision.load_in_4bit and read_manifest(parent).get("merged_onto") == "quantised":
                print(
                    "note: the parent was merged onto its quantised base and is quantised again here, which rounds "
                    "small changes away; merged with --merge_base original it keeps them (docs/artifacts.md)"
                )

    def begin(self, data: StageData) -> None:
        """Do the last checks, then lock the output folder and prepare the base if needed. A dry run ends here.

        Checkpoints of a run on other data, or with other settings, are refused.
        """
        with user_errors():
            check_course(self, data)
            self._check_machine(data.tokenizer)
            if self.settings.dry_run:
                print("dry run: settings, data, model folder and masks are fine")
                sys.exit(0)
            wait_for_everyone()  # all processes have looked before anything changes
            if is_main():
                self.lock.acquire()
                try:
                    self._take_over(data)
                except BaseException:
                    self.lock.release()
                    raise
            wait_for_everyone()
            if self.to_prepare is not None:  # the main process has prepared it
                self.starts_from, self.to_prepare = self.to_prepare, None

    def _take_over(self, data: StageData) -> None:
        # Writes for the first time: this run holds the lock of the output folder.
        for folder in self.to_move:
            move_aside(folder)
        if self.lora.exists():
            raise FileExistsError(f"{self.lora} was made by another run meanwhile: run the command again")
        self.work.mkdir(parents=True, exist_ok=True)
        if self.to_prepare is not None:
            if self.to_prepare.exists():
                raise FileExistsError(f"{self.to_prepare} was made by another run meanwhile: run the command again")
            print(f"preparing {self.parent} -> {self.to_prepare}")
            with self.machine_errors("preparing the base"), new_folder(self.to_prepare) as beside:
                entries = prepare_base(self.parent, beside, self.settings.full_vocab)
                if Path(self.parent).is_dir():
                    entries["base_files"] = file_table(Path(self.parent), model_only=True)
                write_manifest(beside, provenance("prepared", self.stage.script, self.settings, **entries))
            self.starts_from, self.to_prepare = self.to_prepare, None
            moved = len(self.to_move)
            check_course(self, data)  # now with the base
            for folder in self.to_move[moved:]:
                move_aside(folder)
            self.work.mkdir(exist_ok=True)
        self.made_from = made_from(self.parent, self.lora)
        write_course(self, data)

    def _check_machine(self, tokenizer: Any) -> None:
        # Raises ValueError if the disk lacks room for what will be written, or the device memory for the weights.
        from transformers import AutoConfig

        settings, precision = self.settings, self.precision
        checkpoints = complete_checkpoints(self.work, quiet=True)
        finished = bool(checkpoints) and _is_over(self.last_state())
        config = AutoConfig.from_pretrained(str(self.parent), trust_remote_code=False)
        vocabulary = None if self.to_prepare is None or settings.full_vocab else len(tokenizer)
        counts = count_weights(config, target_modules=settings.target_modules, r=settings.lora_r, vocabulary=vocabulary)
        best = settings.save_total_limit + 1 if getattr(settings, "collapse_guard", False) else 0
        disk = disk_needs(
            counts, optim=settings.optim, checkpoints_there=len(checkpoints), prepared=self.to_prepare is not None,
            checkpoints=0 if settings.save_steps == 0 or finished else settings.save_total_limit,
            best=max(0, best - len(list(self.work.glob("best-*.safetensors")))),
        )  # fmt: skip
        memory = memory_needs(counts, **asdict(precision), optim=settings.optim, processes=process_count())
        free = read_free(settings.output_dir)
        if free.memory_name == "main memory":
            free = replace(free, memory=free.memory // process_count())  # each has a copy of the model
        # What a killed run left half-written will be deleted.
        incomplete = [folder.with_name(folder.name + INCOMPLETE) for folder in (self.lora, self.merged)]
        incomplete += [path for path in self.work.glob("checkpoint-*") if path not in checkpoints]
        size = sum(path.stat().st_size for folder in incomplete for path in folder.rglob("*") if path.is_file())
        shortages = find_shortages([disk, *memory], replace(free, disk=free.disk + size))
        if shortages:
            raise ValueError("\n".join(shortages))

    def train(self, trainer: Any) -> None:
        """Train, from the last complete checkpoint if there is one, and print a summary."""
        with user_errors():
            checkpoint = self.last_checkpoint()
            if checkpoint is not None:
                refuse_pickles(checkpoint)
        before = {"global_step": 0, "max_steps": -1, "num_input_tokens_seen": 0}
        if checkpoint is not None:
            print(f"continuing from {checkpoint}")
            if is_main():
                with self.machine_errors("deleting older checkpoints"):
                    delete_older(self.work)
            before = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if _is_over(before):
                # Training was finished but not saved. A trainer that resumes here would take one step more.
                with self.machine_errors("loading the checkpoint"):
                    trainer._load_from_checkpoint(str(checkpoint))
                    trainer.state = type(trainer.state)(**before)
                return
        with self.machine_errors("training"), StopSignals() as signals:
            guard(
                trainer, signals=signals, save_seconds=SAVE_SECONDS if self.settings.save_steps is None else None,
                steps_between_saves_multiple=generation_steps(trainer.args), keep=self.settings.save_total_limit,
            )  # fmt: skip
            try:
                result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except (NonFiniteAnswersError, RuntimeError) as error:  # stage 3 samples before the loss is checked
                if isinstance(error, NonFiniteAnswersError) or NO_PROBABILITIES in str(error):
                    raise NonFiniteError("the model answers with NaN", trainer.state.global_step) from error
                raise
        signals.end_if_received(self.work)
        _print_summary(trainer.state, before, result.metrics.get("train_runtime", 0.0))

    def machine_errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Turn trouble of the machine in the block into one message that says what is safe, see runs/troubles.py."""
        in_use: dict[str, Any] = {}
        if doing == "training":  # the settings, with the choices that were made where they leave one open
            in_use = asdict(self.settings) | {"dtype": self.precision.dtype}
            if self.plan is not None:
                names = ("micro_batch_size", "gradient_checkpointing", "padding_free", "compile_layers")
                in_use |= {name: getattr(self.plan, name) for name in names}
                if self.settings.dataloader_num_workers is None:
                    in_use["dataloader_num_workers"] = self.plan.loader_processes
        artifacts = [self.stage.default_parent(self.settings), self.lora, self.merged]
        return machine_errors(
            doing, in_use, folder=self.settings.output_dir, checkpoint=self.last_checkpoint, artifacts=artifacts
        )

    def save(self, model: Any, data: StageData, **about: Any) -> None:
        """Write the adapter with its tokenizer, manifest, metrics, curves and probe (answers of the trained model).

        Only the main process saves and merges; the others end here. `about` are more entries of the manifest.
        """
        from arc.training.curves import plot_metrics

        leave()
        batches = self.plan.choice() if self.plan is not None else None
        manifest = provenance(
            self.stage.name, self.stage.script, self.settings, data_fingerprint=data.split.train.content_hash(),
            made_from=self.made_from, batches=batches, **about,
        )  # fmt: skip
        with self.machine_errors("saving the adapter"), new_folder(self.lora) as beside:
            save_adapter(model, data.tokenizer, beside, base=self.parent, precision=self.precision, manifest=manifest)
            metrics = self.work / "metrics.jsonl"
            if metrics.is_file():
                shutil.copy(metrics, beside / metrics.name)
                with _never_fatal("no picture of the curves"):
                    plot_metrics(metrics, beside / "loss.png")
            with _never_fatal("what the trained model answers is not recorded"):
                rows = data.heldout_rows(self.settings.max_seq_length)[:PROBE_ROWS] or make_probe_rows(data.tokenizer)
                record_probe(model, self.precision.engine, data.tokenizer, rows, beside / PROBE)
        print(f"saved {self.lora}")

    def merge(self) -> None:
        """Merge the adapter into its base, unless the merge exists, and prove that the result is their sum."""
        from accelerate.utils.memory import clear_device_cache

        leave()
        try:
            with user_errors():
                if is_merged(self):
                    print(f"{self.merged} is there: merge skipped")
                    return
                if self.settings.dry_run:
                    print(f"dry run: {self.lora} would be merged into {self.merged}")
                    return
                self.lock.acquire()
                if is_merged(self):
                    raise FileExistsError(f"{self.merged} was made by another run meanwhile: run the command again")
                parent = where_the_parent_is(self)
                if self.merged.exists():
                    move_aside(self.merged)
            clear_device_cache(garbage_collection=True)  # the memory of the trained model
            begin = time.perf_counter()
            with self._merge_errors(), self.machine_errors("merging"), new_folder(self.merged) as beside:
                entries = merge_and_check(self.lora, beside, base=parent, merge_base=self.settings.merge_base)
                # The settings are those of the adapter's manifest: this run's flags may differ.
                manifest = {name: value for name, value in read_manifest(self.lora).items() if name != "files"}
                manifest |= {"adapter": str(self.lora.resolve()), **entries, "base": str(parent)}
                write_manifest(beside, {**manifest, "made_from": made_from(self.lora, self.merged)})
        finally:
            self.lock.release()
        print(describe_check(entries["check"]))
        kind, seconds = entries["merged_onto"], time.perf_counter() - begin
        print(f"saved {self.merged}: merged onto the {kind} base in {seconds:.0f} s")
        if kind == "quantised":
            print(
                "note: a next stage that quantises this model again loses its small changes (docs/artifacts.md); to "
                "keep them, run this again with --merge_base original --overwrite"
            )

    @contextlib.contextmanager
    def _merge_errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, MergeError) as error:
            if os.environ.get("ARC_TRACEBACK"):
                raise
            if isinstance(error, ValueError):  # the adapter does not fit its base, or cannot be merged at all
                fail(f"error: {self.lora} cannot be merged: {error}", 2)
            proof = f"error: the merge of {self.lora} failed its proof and was not kept: {error}"
            fail(f"{proof}\nThe adapter is as it was.", 1)


def _print_summary(state: Any, before: dict[str, Any], seconds: float) -> None:
    # Steps, time, loss and tokens of a training that began at the state `before`.
    import torch

    losses = [record["loss"] for record in state.log_history if "loss" in record] or [math.nan]
    tokens = state.num_input_tokens_seen - before["num_input_tokens_seen"]
    memory = ""
    if torch.cuda.is_available():
        memory = f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print(
        f"trained {state.global_step - before['global_step']} steps to step {state.global_step} in "
        f"{format_duration(seconds)}: last loss {losses[-1]:.4f}, {tokens:,} tokens, "
        f"{tokens / max(seconds, 1e-9):,.0f} tokens/s{memory}"
    )


@contextlib.contextmanager
def _never_fatal(without: str) -> Iterator[None]:
    # Hours of training must not be lost to a plot, or to a forward pass that a library has changed.
    try:
        yield
    except Exception as error:  # noqa: BLE001
        if os.environ.get("ARC_TRACEBACK"):
            raise
        print(f"note: {without} ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]})")


def _is_over(state: dict[str, Any]) -> bool:
    # Whether a training, by the state of its newest checkpoint, is done or was stopped for a reason (grpo/guard.py).
    callbacks = (state.get("stateful_callbacks") or {}).values()
    stopped = any(isinstance(stored, dict) and stored.get("reason") for stored in callbacks)
    return state["global_step"] == state["max_steps"] or stopped


def import_unsloth() -> None:
    """Import Unsloth before trl, peft and transformers' models: it patches them."""
    import warnings

    with warnings.catch_warnings():
        # The parser of the flags has loaded transformers' top level, which holds nothing that is patched.
        warnings.filterwarnings("ignore", message="WARNING: Unsloth should be imported before")
        import unsloth  # noqa: F401


def lora_options(settings: RunSettings) -> dict[str, Any]:
    """The settings' LoRA as keyword arguments of `add_lora`."""
    same = ("target_modules", "lora_alpha", "lora_dropout", "use_rslora", "random_state", "max_seq_length")
    return {name: getattr(settings, name) for name in same} | {
        "r": settings.lora_r,
        "fold": settings.fold_lora,
        "gradient_checkpointing": settings.gradient_checkpointing is not False,  # until the plan decides
    }
