"""One run of a stage: settings, data, artifacts, trainer, logs.

The stage scripts decide what is trained on what; this module does what they have in common. Heavy libraries are
imported inside functions, Unsloth before the libraries that it patches.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from arc_loader import ArcDataset, Holdout, format_options
from arc_samples import SampleEncoder, TrainingSamples
from model_tools import (
    EMBEDDING_MODULES,
    LINEAR_MODULES,
    MANIFEST,
    InputMaskingDataCollator,
    Precision,
    check_base,
    config_token_ids,
    cut_tokenizer,
    format_duration,
    load_tokenizer,
    merge_adapter,
    prepare_base,
    print_mask_report,
    read_manifest,
    resolve_precision,
    save_adapter,
    train_in_float32,
    write_manifest,
)
from report_tools import read_metrics

# Settings that say where and how a run is done and watched, not what comes out of it.
NOT_THE_COURSE = (
    "dataset_dir", "output_dir", "artifact_prefix", "dry_run", "merge_base", "logging_steps", "save_steps",
    "save_total_limit", "report_to", "dataloader_num_workers",
)  # fmt: skip
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "numpy",
)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and the sentence that --help shows."""
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RunSettings:
    """What all stages share: where things are, how they run, LoRA's shape. The stages add what they decide."""

    # Where
    base_model: str | None = setting(None, "folder or hub name to start from; default: the parent stage's -merged")
    dataset_dir: str = setting(
        "dataset", "folder of task files: lists of input/output pairs, or official train/test files"
    )
    output_dir: str = setting("output", "folder of all artifacts; stages find each other's there")
    artifact_prefix: str = setting("Llama-3.2-1B", "first part of the artifacts' names")
    # How
    engine: str = setting("auto", "unsloth, transformers, or auto: unsloth where there is CUDA")
    load_in_4bit: bool | None = setting(None, "quantise the frozen base; default: on unsloth only")
    dtype: str = setting("auto", "bfloat16, float16, float32, or auto: what this machine has")
    full_vocab: bool = setting(False, "keep the whole vocabulary instead of one token per cell")
    merge_base: str = setting(
        "quantised", "merge onto the base as trained on (quantised) or its 16-bit weights (original)"
    )
    seed: int = setting(42, "seed of order and augmentation")
    dry_run: bool = setting(False, "check settings, data, model folder and masks, then stop")
    # Data
    n: int | None = setting(
        None, "base puzzles to train on; default: all that the files yield without using an example twice"
    )
    sizes: list[int] = setting([6], "demonstration pairs of a puzzle; several: taken in turn")
    grid_sizes: list[int] = setting([], "keep only pairs whose sides lie between these two bounds; default: all")
    dataset_seed: int = setting(42, "seed of how examples form puzzles")
    tp: str = setting("all", "transposed views: all, true (one drawn a sample) or false")
    rt: str = setting("all", "rotated views: all, true (one drawn a sample) or false")
    perm: bool = setting(True, "a new colour permutation for each sample and epoch")
    keep_background: bool = setting(False, "colour permutations leave 0 alone")
    shfl_ex: bool = setting(True, "a new order of the demonstrations for each sample and epoch")
    max_seq_length: int = setting(1536, "longest row in tokens; demonstrations are dropped to fit")
    # Held out: the same flags everywhere give the same split, so that no stage trains on what the evaluation uses
    holdout_examples: int = setting(64, "puzzles held out, spread evenly over the tasks that are trained on")
    holdout_tasks: int = setting(0, "whole tasks held out")
    holdout_seed: int = setting(42, "seed of the split")
    # LoRA
    lora_r: int = setting(512, "rank; embed_tokens and lm_head are trained in full whatever the rank")
    lora_alpha: float = setting(24.0, "the update is scaled by alpha / sqrt(r)")
    lora_dropout: float = setting(0.0, "dropout in front of the LoRA matrices")
    lora_bias: str = setting("none", "none, all or lora_only")
    use_rslora: bool = setting(True, "rank-stabilised scaling; false: alpha / r")
    target_modules: list[str] = setting(LINEAR_MODULES + EMBEDDING_MODULES, "layers that LoRA is added to")
    random_state: int = setting(42, "seed of LoRA's initial values")
    # Training
    per_device_train_batch_size: int = setting(4, "samples of one forward pass")
    gradient_accumulation_steps: int = setting(2, "forward passes of one step")
    num_train_epochs: float = setting(1.0, "epochs; an epoch holds every base puzzle in each of its enumerated views")
    max_steps: int = setting(-1, "stop after this many steps; -1: when the epochs are done")
    learning_rate: float = setting(1e-4, "highest rate of the LoRA matrices")
    embedding_learning_rate: float = setting(1e-5, "highest rate of embed_tokens and lm_head")
    lr_scheduler_type: str = setting("cosine", "a schedule of transformers")
    warmup_ratio: float = setting(0.25, "share of the steps in which the rate rises")
    optim: str = setting("adamw_8bit", "an optimizer of transformers")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    gradient_checkpointing: bool = setting(True, "recompute activations to save memory; false is faster where they fit")
    # Watching
    logging_steps: int = setting(10, "steps between log lines")
    eval_steps: int = setting(500, "steps between measurements on the held-out puzzles; 0: never")
    eval_puzzles: int = setting(32, "held-out puzzles that are decoded for the exact match; 0: none")
    save_steps: int = setting(500, "steps between checkpoints; 0: none")
    save_total_limit: int = setting(2, "checkpoints kept")
    report_to: str = setting("none", "none, tensorboard, wandb, ...")
    dataloader_num_workers: int = setting(0, "processes that make batches ahead; 0: the main one does")


def parse_settings(cls: type, argv: Sequence[str] | None = None) -> Any:
    """Parse flags (`--learning_rate 1e-4`) and an optional `--config file.yaml` into a settings dataclass.

    Flags win over the file. Whatever is wrong is said in one message, with exit code 2.
    """
    import yaml
    from transformers.hf_argparser import HfArgumentParser

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(cls, description=sys.modules[cls.__module__].__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; flags win over it")
    with user_errors():
        config, _ = _config_parser().parse_known_args(argv)
        if config.config is not None:
            path = Path(config.config)
            if not path.is_file():
                raise FileNotFoundError(f"--config {path}: no such file")
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
            known = {f.name for f in fields(cls)}
            if not isinstance(values, dict) or set(values) - known:
                unknown = sorted(map(str, set(values) - known)) if isinstance(values, dict) else [type(values).__name__]
                raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; see --help for the names")
            # As flags before the others: the parser converts and checks them in the same way, and later flags win.
            argv = [*_as_flags(values), *argv]
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(f"unknown flags: {' '.join(unknown)}; see --help")
        values = {f.name: getattr(namespace, f.name) for f in fields(cls)}
        settings = cls(**values)
        problems = find_problems(settings)
        if problems:
            raise ValueError("\n".join(["settings that cannot be used:", *(f"  --{p}" for p in problems)]))
    return settings


def _config_parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        flags += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return flags


def find_problems(settings: RunSettings) -> list[str]:
    """Everything wrong with the settings themselves, one line each; empty if nothing is."""
    problems = []

    def check(name: str, good: bool, expected: str) -> None:
        if not good:
            problems.append(f"{name} is {getattr(settings, name)!r}: expected {expected}")

    for name in ("learning_rate", "embedding_learning_rate", "lora_alpha", "max_grad_norm", "num_train_epochs"):
        value = getattr(settings, name)
        check(name, math.isfinite(value) and value > 0, "a number above 0")
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lora_r",
        "logging_steps",
        "save_total_limit",
    ):
        check(name, getattr(settings, name) >= 1, "a whole number from 1")
    for name in (
        "holdout_examples",
        "holdout_tasks",
        "eval_steps",
        "eval_puzzles",
        "save_steps",
        "dataloader_num_workers",
        "seed",
    ):
        check(name, getattr(settings, name) >= 0, "a whole number from 0")
    check("n", settings.n is None or settings.n >= 1, "a whole number from 1")
    check("max_steps", settings.max_steps == -1 or settings.max_steps >= 1, "a whole number from 1, or -1 for no limit")
    check("max_seq_length", settings.max_seq_length >= 16, "a whole number from 16")
    check("weight_decay", math.isfinite(settings.weight_decay) and settings.weight_decay >= 0, "a number from 0")
    check("warmup_ratio", 0 <= settings.warmup_ratio < 1, "a share from 0 to below 1")
    check("lora_dropout", 0 <= settings.lora_dropout < 1, "a share from 0 to below 1")
    check("sizes", len(settings.sizes) > 0 and min(settings.sizes) >= 1, "whole numbers from 1")
    bounds = settings.grid_sizes
    check("grid_sizes", not bounds or (len(bounds) == 2 and 1 <= bounds[0] <= bounds[1]), "two bounds, such as 1 10")
    for name, choices in {
        "engine": ("auto", "unsloth", "transformers"),
        "dtype": ("auto", "bfloat16", "float16", "float32"),
        "merge_base": ("quantised", "original"),
        "tp": ("all", "true", "false"),
        "rt": ("all", "true", "false"),
        "lora_bias": ("none", "all", "lora_only"),
    }.items():
        check(name, str(getattr(settings, name)).lower() in choices, " or ".join(choices))
    unknown = [m for m in settings.target_modules if m not in LINEAR_MODULES + EMBEDDING_MODULES]
    good = not unknown and any(m in LINEAR_MODULES for m in settings.target_modules)
    check("target_modules", good, f"names among {' '.join(LINEAR_MODULES + EMBEDDING_MODULES)}, not only embeddings")
    return problems


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can mend (ValueError, FileNotFoundError and the like) into one message and exit code 2.

    Meant for the set-up of a run. Errors inside training are bugs or machine trouble and keep their traceback.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("ARC_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts


@dataclass(frozen=True)
class Stage:
    """Names of a stage and of the artifact that it starts from.

    Args:
        name: "Base", "Final" or "Final-RL".
        parent: what it starts from: "prepared", or the name of an earlier stage.
        script: the file, for messages.
        parent_script: the file that makes the parent, for messages.
    """

    name: str
    parent: str
    script: str
    parent_script: str

    def lora(self, settings: RunSettings) -> Path:
        """Folder of the adapter."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-lora"

    def merged(self, settings: RunSettings) -> Path:
        """Folder of the merged model."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-merged"

    def checkpoints(self, settings: RunSettings) -> Path:
        """Folder of the checkpoints and logs of the training, beside the artifacts."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-checkpoints"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete: written beside, then renamed.

    Yields:
        The folder to write into. If the block raises, nothing stays under `path`.

    Raises:
        FileExistsError: `path` exists; nothing is ever overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.incomplete")
    if beside.exists():  # what an interrupted run left
        shutil.rmtree(beside)
    beside.mkdir()
    yield beside
    beside.rename(path)


def is_complete(folder: Path) -> bool:
    """Whether a folder is a finished artifact: a manifest of ours, or weights and configuration made elsewhere.

    Raises:
        ValueError: it exists and is neither.
    """
    if not folder.exists():
        return False
    made_here = (folder / MANIFEST).is_file()
    weights = any(folder.glob("*.safetensors"))
    config = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    if weights and config:
        if not made_here:
            print(f"{folder} has no {MANIFEST}: made elsewhere, used as it is")
        return True
    raise ValueError(
        f"{folder} exists but holds no complete model: expected config and *.safetensors; move it away and run again"
    )


def provenance(stage: str, settings: RunSettings, precision: Precision | None = None, **more: Any) -> dict[str, Any]:
    """What an artifact records of its making: stage, settings, versions, machine."""
    return {
        "stage": stage,
        "settings": asdict(settings),
        "versions": versions(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"precision": precision.as_dict()} if precision else {}),
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training depends on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def parent_folder(stage: Stage, settings: RunSettings) -> Path:
    """The folder that a stage starts from; stage 1's is made from the base model when it is not there.

    Raises:
        FileNotFoundError: the parent stage has not run.
        ValueError: the base model cannot be prepared.
    """
    output = Path(settings.output_dir)
    if stage.parent != "prepared":
        folder = Path(settings.base_model or output / f"{settings.artifact_prefix}-{stage.parent}-merged")
        if not is_complete(folder):
            raise FileNotFoundError(
                f"{folder} is not there: {stage.script} starts from the merged model of {stage.parent_script}. Run "
                f"`python {stage.parent_script} --output_dir {output}` first, or name a folder with --base_model"
            )
        return folder
    folder = output / f"{settings.artifact_prefix}-prepared"
    if not is_complete(folder):
        check_base(settings.base_model)
        if settings.dry_run:
            return Path(settings.base_model)
        print(f"preparing {settings.base_model} -> {folder}")
        with new_folder(folder) as beside:
            done = prepare_base(settings.base_model, beside, settings.full_vocab)
            write_manifest(beside, provenance("prepared", settings, **done))
    else:
        made = read_manifest(folder)
        same = made.get("base_model") in (None, str(settings.base_model))
        if not same or bool(made.get("settings", {}).get("full_vocab")) != settings.full_vocab:
            raise ValueError(
                f"{folder} was prepared from {made.get('base_model')} with full_vocab "
                f"{made.get('settings', {}).get('full_vocab')}: use those flags, or another --output_dir"
            )
        print(f"{folder} is there: used")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class StageData:
    """Rows of a stage: what is trained on, what is held out, and how rows become tokens."""

    split: Holdout
    samples: TrainingSamples
    encoder: SampleEncoder
    tokenizer: Any
    heldout: ArcDataset

    @property
    def format(self) -> dict[str, str]:
        """The text format's options."""
        return format_options(self.tokenizer.eos_token)

    def prompts(self, count: int, max_tokens: int) -> list[dict[str, Any]]:
        """Up to `count` held-out rows that end where the reply begins, as the encoder gives them."""
        return self._fitting(count, max_tokens, reply=False)

    def heldout_rows(self, max_tokens: int) -> list[dict[str, Any]]:
        """All held-out rows with their replies that fit."""
        return self._fitting(None, max_tokens, reply=True)

    def _fitting(self, count: int | None, max_tokens: int, reply: bool) -> list[dict[str, Any]]:
        rows = []
        for key in self.heldout.keys[:count]:
            with contextlib.suppress(ValueError):  # a puzzle that does not fit; load_data has said how many
                rows += self.encoder.encode(self.heldout, [key], max_tokens=max_tokens, reply=reply)
        return rows


def load_split(settings: RunSettings) -> Holdout:
    """Load the dataset folder and split it, the same way in every script; `n` limits what is trained on.

    Raises:
        ValueError, FileNotFoundError: bad data, missing folder, more held out or asked for than there is.
    """
    bounds = tuple(settings.grid_sizes) or None
    data = ArcDataset.load_from_local_json(
        settings.dataset_dir, sizes=tuple(settings.sizes), seed=settings.dataset_seed, grid_sizes=bounds
    )
    split = data.holdout(examples=settings.holdout_examples, tasks=settings.holdout_tasks, seed=settings.holdout_seed)
    train = split.train if settings.n is None else split.train.subset(settings.n)
    print(
        f"{settings.dataset_dir}: {len(data.keys):,} base puzzles; {len(train.keys):,} to train on, held out "
        f"{len(split.seen.keys):,} of the same tasks and {len(split.unseen.keys):,} of {settings.holdout_tasks} others"
    )
    return split._replace(train=train)


def augmentation(settings: RunSettings) -> dict[str, Any]:
    """The settings' augmentation as keyword arguments of the loader."""
    choice = {"all": "all", "true": True, "false": False}
    return {
        "tp": choice[settings.tp.lower()],
        "rt": choice[settings.rt.lower()],
        "perm": settings.perm,
        "keep_background": settings.keep_background,
        "shfl_ex": settings.shfl_ex,
    }


def stage_tokenizer(folder: str | Path, settings: RunSettings) -> Any:
    """The tokenizer that a stage will use; in a dry run before the base is prepared, the one that it will get."""
    tokenizer = load_tokenizer(folder)
    if not settings.full_vocab and settings.dry_run and not (Path(folder) / MANIFEST).is_file():
        from transformers import AutoConfig

        tokenizer, _ = cut_tokenizer(tokenizer, config_token_ids(AutoConfig.from_pretrained(str(folder))))
    return tokenizer


def load_data(run: StageRun) -> StageData:
    """Load and split the data and make the rows that are trained on. What is left out is counted and printed.

    Raises:
        ValueError, FileNotFoundError: bad data, or nothing that fits `max_seq_length`.
    """
    settings, tokenizer = run.settings, stage_tokenizer(run.parent, run.settings)
    split = load_split(settings)
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    # In an epoch that steps cut short, later epochs still draw their own views.
    epochs = max(1, math.ceil(settings.num_train_epochs))
    samples = TrainingSamples(
        split.train, encoder, settings.max_seq_length, seed=settings.seed, epochs=epochs, **augmentation(settings)
    )
    if samples.dropped:
        print(
            f"left out: {len(samples.dropped):,} puzzles that do not fit --max_seq_length {settings.max_seq_length} "
            f"with one demonstration ({', '.join(samples.dropped[:3])}{', ...' if len(samples.dropped) > 3 else ''})"
        )
    if len(samples) == 0:
        raise ValueError(f"no puzzle fits --max_seq_length {settings.max_seq_length}: raise it, or lower --sizes")
    heldout = split.seen if len(split.seen.keys) else split.unseen
    data = StageData(split, samples, encoder, tokenizer, heldout)
    short = len(heldout.keys) - len(data.heldout_rows(settings.max_seq_length))
    if short:
        print(f"held out: {short} of {len(heldout.keys)} puzzles do not fit --max_seq_length and are not measured")
    return data


def report_masks(run: StageRun, data: StageData, collator: InputMaskingDataCollator) -> None:
    """Print what is learned, how much there is, and about how long it will take."""
    settings = run.settings
    lengths = data.samples.lengths()
    steps_per_epoch = math.ceil(len(data.samples) / batch_size(settings))
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps / steps_per_epoch
    tokens = float(lengths.mean()) * len(data.samples) * epochs
    seed_rows = np.random.default_rng(settings.seed).permutation(len(data.samples))[:32]
    rows = data.samples.__getitems__(seed_rows.tolist())
    seconds = estimate_seconds(run, tokens)
    print_mask_report(rows, collator, lengths=lengths, rows_per_epoch=len(data.samples), epochs=epochs, seconds=seconds)
    shortened = data.samples.shortened()
    if shortened:
        print(f"shortened: {shortened:.1%} of the samples lose demonstrations to fit {settings.max_seq_length} tokens")


def batch_size(settings: RunSettings) -> int:
    """Samples of one optimizer step."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


# Share of the machine's measured matrix rate that training reached; see benchmarks/README.md.
EFFICIENCY = {("unsloth", "cuda"): 0.12, ("transformers", "cuda"): 0.35, ("transformers", "cpu"): 0.35}


def estimate_seconds(run: StageRun, tokens: float) -> float:
    """Rough seconds for training on `tokens` tokens: 6 operations a parameter and token at a rate measured just now."""
    import torch
    from transformers import AutoConfig

    precision = run.precision
    config = AutoConfig.from_pretrained(str(run.parent))
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * (hidden * hidden * 3 + 3 * hidden * config.intermediate_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 4096 if device == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=precision.torch_dtype)
    for _ in range(3):
        a @ a
    synchronise = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronise()
    begin = time.perf_counter()
    for _ in range(10):
        a @ a
    synchronise()
    rate = 10 * 2 * side**3 / (time.perf_counter() - begin)
    return 6 * parameters * tokens / (rate * EFFICIENCY[precision.engine, device])


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


class EpochSampler:
    """Rows of an epoch in a seeded order that depends on (seed, epoch) alone.

    Yields `epoch * rows + index`, so that a row number names its epoch: the views of an epoch are its own, in whatever
    process a row is made.
    """

    def __init__(self, rows: int, seed: int):
        """See the class."""
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer when an epoch begins."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        """Row numbers of the current epoch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return iter((self.epoch * self.rows + order).tolist())

    def __len__(self) -> int:
        """Rows of one epoch."""
        return self.rows


def lazy_dataset(rows: Any, count: int) -> Any:
    """A datasets.Dataset of `count` row numbers whose rows are made when read (trl takes no other map-style one)."""
    from datasets import Dataset

    def make(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = rows.__getitems__(batch["row"]) if hasattr(rows, "__getitems__") else [rows[i] for i in batch["row"]]
        return {name: [row[name] for row in made] for name in made[0]}

    return Dataset.from_dict({"row": list(range(count))}).with_transform(make)


def sft_trainer(model: Any, run: StageRun, data: StageData, collator: InputMaskingDataCollator) -> Any:
    """The trainer of a supervised stage: UnslothTrainer on the Unsloth engine, transformers' Trainer otherwise.

    Both have the same parameter groups (`embedding_learning_rate` for embed_tokens and lm_head), order and views.
    """
    settings, precision = run.settings, run.precision
    heldout = data.heldout_rows(settings.max_seq_length)
    measured = settings.eval_steps > 0 and len(heldout) > 0
    arguments = {
        **common_arguments(run),
        "per_device_eval_batch_size": settings.per_device_train_batch_size,
        "eval_strategy": "steps" if measured else "no",
        "eval_steps": settings.eval_steps if measured else None,
        "include_num_input_tokens_seen": "non_padding",
        "prediction_loss_only": True,
    }
    if precision.engine == "transformers":
        from transformers import Trainer, TrainingArguments

        base, arguments = Trainer, TrainingArguments(**arguments)
        arguments.embedding_learning_rate = settings.embedding_learning_rate
        train, evaluation = data.samples, heldout
    else:
        from unsloth import UnslothTrainer, UnslothTrainingArguments

        base = UnslothTrainer
        arguments = UnslothTrainingArguments(
            embedding_learning_rate=settings.embedding_learning_rate,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=settings.max_seq_length,
            **arguments,
        )
        rows = len(data.samples) * max(1, math.ceil(settings.num_train_epochs))
        train, evaluation = lazy_dataset(data.samples, rows), lazy_dataset(heldout, len(heldout))
    sampler = EpochSampler(len(data.samples), settings.seed)

    class StageTrainer(base):
        """The engine's trainer with this pipeline's order of rows and learning rates."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochSampler:
            return sampler

        def create_optimizer(self, model: Any = None) -> Any:
            if base.__name__ != "Trainer":
                return super().create_optimizer() if model is None else super().create_optimizer(model)
            return _optimizer_with_embedding_rate(self, model or self.model)

    return StageTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation if measured else None,
        data_collator=collator,
        processing_class=data.tokenizer,
    )


class PromptRows:
    """Prompts of the samples: row -> {"prompt": text, "key": view}, for trl's GRPOTrainer."""

    def __init__(self, data: StageData):
        """See the class."""
        self.data = data

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number; a prompt leaves room for its reply within the longest row."""
        keys = [row["key"] for row in self.data.samples.__getitems__(rows)]
        tasks = [self.data.split.train.fmt_task(key, **self.data.format) for key in keys]
        return [{"prompt": task["input"], "key": task["key"]} for task in tasks]


def report_prompts(run: StageRun, data: StageData, max_completion_length: int) -> None:
    """Print one prompt, how many there are and how long prompts and completions may be.

    Raises:
        ValueError: groups that do not divide the batch.
    """
    settings = run.settings
    completions = batch_size(settings)
    if settings.num_generations < 2 or completions % settings.num_generations:
        raise ValueError(
            f"--num_generations is {settings.num_generations}: expected a number from 2 that divides the completions "
            f"of a step, per_device_train_batch_size x gradient_accumulation_steps = {completions}"
        )
    row = PromptRows(data).__getitems__([0])[0]
    print(f"key {row['key']}\n{row['prompt']}")
    print(
        f"{len(data.samples):,} prompts, with their replies up to {settings.max_seq_length} tokens; completions of up "
        f"to {max_completion_length}; a step: {completions // settings.num_generations} prompts x "
        f"{settings.num_generations} completions; {settings.max_steps} steps"
    )


def grpo_trainer(
    model: Any,
    run: StageRun,
    data: StageData,
    reward_functions: list[Callable[..., Any]],
    *,
    reward_weights: list[float],
    max_completion_length: int,
) -> Any:
    """trl's GRPOTrainer (patched by Unsloth on its engine) on the prompts of the samples.

    Args:
        model: a peft model.
        run: settings, precision and folders.
        data: prompts and tokenizer.
        reward_functions: each takes `completion_ids` and `key` and returns a number for each completion.
        reward_weights: one for each function; 0 only logs.
        max_completion_length: tokens of the longest reply.
    """
    from trl import GRPOConfig, GRPOTrainer

    settings, precision = run.settings, run.precision
    arguments = GRPOConfig(
        **common_arguments(run),
        num_generations=settings.num_generations,
        max_completion_length=max_completion_length,
        temperature=settings.temperature,
        beta=settings.beta,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss_type,
        reward_weights=reward_weights,
        mask_truncated_completions=False,  # a reply without an end earns nothing: it shall be unlearned, not overlooked
        use_vllm=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_functions,
        args=arguments,
        train_dataset=lazy_dataset(PromptRows(data), len(data.samples)),
        processing_class=data.tokenizer,
    )
    if precision.engine == "transformers":
        train_in_float32(trainer.model)  # trl rounds the trainable weights of a 4-bit base to bfloat16
    return trainer


def _optimizer_with_embedding_rate(trainer: Any, model: Any) -> Any:
    # Unsloth's two groups: the fully trained embeddings at their own rate, LoRA at the main one.
    if trainer.optimizer is None:
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        groups: dict[bool, list[Any]] = {False: [], True: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[".modules_to_save." in name].append(parameter)
        rates = {False: trainer.args.learning_rate, True: trainer.args.embedding_learning_rate}
        trainer.optimizer = cls(
            [
                {"params": parameters, "lr": rates[embedding], "weight_decay": trainer.args.weight_decay}
                for embedding, parameters in groups.items()
                if parameters
            ],
            **options,
        )
        if options.get("optim_bits") == 8:
            # As in transformers and Unsloth: an embedding's optimizer state stays in 32 bits.
            import bitsandbytes

            manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
            for module in model.modules():
                if type(module).__name__ == "Embedding":
                    manager.register_module_override(module, "weight", {"optim_bits": 32})
    return trainer.optimizer


def common_arguments(run: StageRun) -> dict[str, Any]:
    """Arguments that every trainer of the pipeline gets, in transformers' names."""
    import torch

    settings, precision = run.settings, run.precision
    arguments = {
        "output_dir": str(run.work),
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # transformers 5 reads a number below 1 as a share of all steps
        "optim": settings.optim,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": settings.save_total_limit,
        "remove_unused_columns": False,  # the collator reads reply_spans and key, the reward reads key
        "dataloader_num_workers": settings.dataloader_num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "report_to": [] if settings.report_to == "none" else settings.report_to.split(","),
    }
    if precision.engine == "transformers":
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def metrics_callback(run: StageRun, measure: Callable[[], dict[str, float]] | None) -> Any:
    """A callback that writes metrics.jsonl, adds tokens/s and measures the model on held-out puzzles.

    Args:
        run: gives the folder and the intervals.
        measure: called every `eval_steps` steps and at the end; its numbers are logged.
    """
    from transformers import TrainerCallback

    settings = run.settings

    class Metrics(TrainerCallback):
        """Adds to the logs and keeps them."""

        def __init__(self) -> None:
            self.path = run.work / "metrics.jsonl"
            self.seen: tuple[float, int] | None = None
            self.paused = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # A continued run repeats the steps after its checkpoint: their lines are written anew.
            kept = [r for r in read_metrics(self.path) if r["step"] <= state.global_step] if self.path.is_file() else []
            kept = kept if state.global_step else []
            self.path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            self.seen = (time.perf_counter(), state.num_input_tokens_seen)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            logs = logs if logs is not None else {}
            now, tokens = time.perf_counter(), state.num_input_tokens_seen
            begin, before = self.seen or (now, tokens)
            if "loss" in logs and tokens > before:
                logs["tokens_per_s"] = round((tokens - before) / max(1e-9, now - begin - self.paused), 1)
                self.seen, self.paused = (now, tokens), 0.0
            self.write(state, logs)

        def write(self, state: Any, numbers: dict[str, Any]) -> None:
            record = {"step": state.global_step, "time": round(time.time(), 3), **numbers}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            # The time of a measurement is not training time.
            self.paused += (metrics or {}).get("eval_runtime", 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = state.global_step == state.max_steps
            if last and args.eval_strategy != "no":
                control.should_evaluate = True
            if measure is not None and (last or state.global_step % settings.eval_steps == 0):
                begin = time.perf_counter()
                numbers = measure()
                self.paused += time.perf_counter() - begin
                state.log_history.append({**numbers, "step": state.global_step})
                self.write(state, numbers)
                print({k: round(v, 4) for k, v in numbers.items()})

    return Metrics()


def _plain(value: Any) -> Any:
    # JSON has no NaN and numpy's and torch's scalars are no Python numbers.
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def heldout_measure(model: Any, run: StageRun, data: StageData) -> Callable[[], dict[str, float]] | None:
    """A function that decodes held-out puzzles greedily and returns the share solved; None if there are none."""
    from inference_tools import exact_match

    settings = run.settings
    prompts = data.prompts(settings.eval_puzzles, settings.max_seq_length) if settings.eval_puzzles else []
    if not prompts or not settings.eval_steps:
        return None
    return lambda: exact_match(
        model, run.precision.engine, data.tokenizer, data.heldout, prompts, settings.eval_puzzles
    )


# ---------------------------------------------------------------------------------------------------------------------
# Train, then merge


class StageRun:
    """One run of a stage: what is there already, what it starts from, training, saving, merging.

    Args:
        stage: names.
        settings: resolved settings.

    Attributes:
        precision: engine and formats of the training.
        parent: the folder that training starts from (None if the adapter is there already).
        work: folder of checkpoints and logs.
    """

    def __init__(self, stage: Stage, settings: RunSettings):
        """Look at what is there and find the parent; a user's mistake ends the program with one message."""
        self.stage, self.settings = stage, settings
        self.lora, self.merged, self.work = stage.lora(settings), stage.merged(settings), stage.checkpoints(settings)
        self.parent: Path | None = None
        with user_errors():
            self.precision = resolve_precision(settings.engine, settings.dtype, settings.load_in_4bit)
            trained, merged = is_complete(self.lora), is_complete(self.merged)
            if trained:
                print(f"{self.lora} is there: training skipped")
                return
            if merged:
                raise ValueError(
                    f"{self.merged} is there without {self.lora}: move it away, or use another --output_dir"
                )
            if self.precision.engine == "unsloth":
                import_unsloth()
            self.parent = parent_folder(stage, settings)
            four_bit = ", base in 4 bits" if self.precision.load_in_4bit else ""
            formats = f"{self.precision.engine}, {self.precision.dtype}{four_bit}"
            print(f"{stage.script}: {self.parent} -> {self.lora} ({formats})")
            if self.precision.load_in_4bit and read_manifest(self.parent).get("merged_onto") == "quantised":
                print(
                    "note: the parent was merged onto its quantised base and is quantised again here, which rounds small "
                    "changes away; merged with --merge_base original it keeps them (benchmarks/README.md)"
                )

    def needs_training(self) -> bool:
        """Whether the adapter is not there yet."""
        return self.parent is not None

    def stop_if_dry(self) -> None:
        """End the program here in a dry run."""
        if self.settings.dry_run:
            print("dry run: settings, data, model folder and masks are fine")
            sys.exit(0)

    def train(self, trainer: Any) -> None:
        """Train, from the last complete checkpoint of an interrupted run if there is one, and print a summary."""
        import torch

        checkpoint = self._last_checkpoint()
        if checkpoint is not None:
            print(f"continuing from {checkpoint}")
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = result.metrics.get("train_runtime", 0.0)
        tokens = trainer.state.num_input_tokens_seen
        memory = (
            f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if torch.cuda.is_available()
            else ""
        )
        print(
            f"trained {trainer.state.global_step} steps in {format_duration(seconds)}: mean loss "
            f"{result.training_loss:.4f}, {tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} tokens/s{memory}"
        )

    def _last_checkpoint(self) -> Path | None:
        # What changes the course of the training must be what the checkpoint was made with.
        course = {k: v for k, v in asdict(self.settings).items() if k not in NOT_THE_COURSE}
        path = self.work / "settings.json"
        # trainer_state.json is what the trainer writes last.
        found = [p.parent for p in self.work.glob("checkpoint-*/trainer_state.json")]
        if found and path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(k for k in course if before.get(k) != json.loads(json.dumps(course[k])))
            if changed:
                print(
                    f"error: {self.work} holds checkpoints of a run with other settings ({', '.join(changed)}): use "
                    "those, or move the folder away to start anew",
                    file=sys.stderr,
                )
                sys.exit(2)
        self.work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(course, indent=2) + "\n", encoding="utf-8")
        return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)

    def save(self, model: Any, data: StageData) -> None:
        """Write the adapter with its tokenizer, manifest, metrics and curves."""
        from report_tools import plot_metrics

        manifest = provenance(self.stage.name, self.settings, data_hash=data.split.train.content_hash())
        with new_folder(self.lora) as beside:
            save_adapter(model, data.tokenizer, beside, base=self.parent, precision=self.precision, manifest=manifest)
            metrics = self.work / "metrics.jsonl"
            if metrics.is_file():
                shutil.copy(metrics, beside / metrics.name)
                plot_metrics(metrics, beside / "loss.png")
        print(f"saved {self.lora}")

    def merge(self) -> None:
        """Merge the adapter into its base, unless that is done."""
        import gc

        import torch

        with user_errors():
            if is_complete(self.merged):
                print(f"{self.merged} is there: merge skipped")
                return
            if self.settings.dry_run:
                print(f"dry run: {self.lora} would be merged into {self.merged}")
                return
            gc.collect()  # the memory of the trained model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            begin = time.perf_counter()
            with new_folder(self.merged) as beside:
                done = merge_adapter(self.lora, beside, merge_base=self.settings.merge_base)
                write_manifest(beside, provenance(self.stage.name, self.settings, adapter=str(self.lora), **done))
        print(f"saved {self.merged}: merged onto the {done['merged_onto']} base in {time.perf_counter() - begin:.0f} s")


def import_unsloth() -> None:
    """Import Unsloth before trl, peft and transformers' models: it patches them."""
    import warnings

    with warnings.catch_warnings():
        # The parser of the flags has loaded transformers' top level, which holds nothing that is patched.
        warnings.filterwarnings("ignore", message="WARNING: Unsloth should be imported before")
        import unsloth  # noqa: F401


def lora_options(settings: RunSettings) -> dict[str, Any]:
    """The settings' LoRA as keyword arguments of `add_lora`."""
    return {
        "target_modules": settings.target_modules,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "bias": settings.lora_bias,
        "use_rslora": settings.use_rslora,
        "random_state": settings.random_state,
        "max_seq_length": settings.max_seq_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
