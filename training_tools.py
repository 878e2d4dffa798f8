"""One run of a stage: settings, data, artifacts, trainer, logs.

The stage scripts decide what is trained on what; this module does what they have in common. Heavy libraries are
imported inside functions, Unsloth before the libraries that it patches.
"""

from __future__ import annotations

import contextlib
import hashlib
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
    "base_model", "dataset_dir", "output_dir", "artifact_prefix", "engine", "dtype", "load_in_4bit", "dry_run",
    "merge_base", "gradient_checkpointing", "logging_steps", "eval_steps", "eval_puzzles", "per_device_eval_batch_size",
    "save_steps", "save_total_limit", "report_to", "dataloader_num_workers",
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
        "quantised",
        "merge onto the base as it was trained on (quantised) or onto its 16-bit weights (original), which a next "
        "stage that quantises again needs to keep small changes",
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
    per_device_eval_batch_size: int = setting(8, "held-out puzzles measured or decoded at once")
    save_steps: int = setting(500, "steps between checkpoints; 0: none")
    save_total_limit: int = setting(2, "checkpoints kept")
    report_to: str = setting("none", "none, tensorboard, wandb, ...")
    dataloader_num_workers: int = setting(0, "processes that make batches ahead; 0: the main one does")

    def problems(self) -> list[str]:
        """What is wrong with the settings that only this stage has, one line each."""
        return []


def parse_settings(cls: type, argv: Sequence[str] | None = None) -> Any:
    """Parse flags (`--learning_rate 1e-4`) and an optional `--config file.yaml` into a settings dataclass.

    Flags win over the file. Whatever is wrong is said in one message, with exit code 2.
    """
    from transformers.hf_argparser import HfArgumentParser

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or log that cannot show a sign gets another, not a traceback
            stream.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(cls, description=sys.modules[cls.__module__].__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; flags win over it")
    with user_errors():
        parser.error = _raise_value_error
        config, _ = _config_parser().parse_known_args(argv)
        if config.config is not None:
            # As flags before the others: the parser converts and checks them in the same way, and later flags win.
            argv = [*_as_flags(_read_config(Path(config.config), cls)), *argv]
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(f"unknown flags: {' '.join(unknown)}; see --help")
        settings = cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)})
        problems = find_problems(settings)
        if problems:
            raise ValueError("\n".join(["settings that cannot be used:", *(f"  --{p}" for p in problems)]))
    return settings


def _raise_value_error(message: str) -> None:
    raise ValueError(f"{message}; see --help")


def _read_config(path: Path, cls: type) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a {type(values).__name__}, expected lines of `name: value`")
    unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; see --help for the names")
    return values


def _config_parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is None or value == []:  # not set: the default
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
        "per_device_eval_batch_size",
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
    check("seed", settings.seed < 2**32, "a whole number below 2**32")
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
    return problems + settings.problems()


def failed_checks(settings: RunSettings, checks: dict[str, tuple[bool, str]]) -> list[str]:
    """One line for each setting whose check (whether it is good, what is expected) failed."""
    return [
        f"{name} is {getattr(settings, name)!r}: expected {expected}"
        for name, (good, expected) in checks.items()
        if not good
    ]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can mend (bad values, missing or unwritable files) into one message and exit code 2.

    Meant for the set-up of a run. Errors inside training are bugs or machine trouble and keep their traceback, as all
    do where ARC_TRACEBACK is set in the environment.
    """
    try:
        yield
    except (ValueError, OSError) as error:
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
    """Whether a folder is a finished artifact: one with a manifest of ours, or one made elsewhere that can be read.

    Raises:
        ValueError: it exists and is neither.
    """
    if not folder.exists():
        return False
    if (folder / MANIFEST).is_file():  # written last, before the folder got its name
        return True
    problem = _unreadable(folder)
    if problem:
        raise ValueError(f"{folder} exists but holds no complete model: {problem}; move it away and run again")
    print(f"{folder} has no {MANIFEST}: made elsewhere, used as it is")
    return True


def _unreadable(folder: Path) -> str | None:
    """What keeps a folder from being loaded as a model or an adapter; None if nothing does."""
    from safetensors import SafetensorError, safe_open

    adapter = (folder / "adapter_config.json").is_file()
    name = "adapter_model" if adapter else "model"
    index = folder / f"{name}.safetensors.index.json"
    shards = {f"{name}.safetensors"}
    if not adapter and not (folder / "config.json").is_file():
        return "expected config.json or adapter_config.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} cannot be read"
    for shard in sorted(shards):
        try:
            with safe_open(folder / shard, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{shard}: {str(error).splitlines()[0]}"
    if not adapter and not (folder / "tokenizer.json").is_file():
        return "expected tokenizer.json"
    return None


def fingerprint(folder: str | Path) -> str:
    """A sha256 that tells one made model from another: of its manifest, else of names, sizes and dates of its files."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    states = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([str(folder) if not files else "", states]).encode()).hexdigest()


def provenance(stage: str, settings: RunSettings, **more: Any) -> dict[str, Any]:
    """What an artifact records of its making: stage, settings, versions, time, and what is given."""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"stage": stage, "settings": asdict(settings), "versions": versions(), "made": made, **more}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training depends on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def find_parent(stage: Stage, settings: RunSettings) -> Path | str:
    """What a stage starts from: a folder or, for a base model that is fetched, its hub name. Nothing is written.

    For stage 1 it is the prepared base where that is there, else the base model that it will be made from.

    Raises:
        FileNotFoundError: no such model, or the parent stage has not run.
        ValueError: the model is quantised already, or the prepared base is another one's.
    """
    output = Path(settings.output_dir)
    if stage.parent == "prepared":
        prepared = output / f"{settings.artifact_prefix}-prepared"
        if is_complete(prepared):
            made = read_manifest(prepared)
            before = made.get("base_model"), made.get("settings", {}).get("full_vocab", settings.full_vocab)
            if before not in ((None, settings.full_vocab), (str(settings.base_model), settings.full_vocab)):
                raise ValueError(
                    f"{prepared} was prepared from {before[0]} with full_vocab {before[1]}: use those flags, or "
                    "another --output_dir"
                )
            print(f"{prepared} is there: used")
            return prepared
        parent: Path | str = settings.base_model or ""
    else:
        parent = settings.base_model or output / f"{settings.artifact_prefix}-{stage.parent}-merged"
        if settings.base_model is None and not Path(parent).exists():
            raise FileNotFoundError(
                f"{parent} is not there: {stage.script} starts from the merged model of {stage.parent_script}. Run "
                f"`python {stage.parent_script} --output_dir {output}` first, or name a model with --base_model"
            )
    check_base(parent)
    if Path(parent).is_dir():
        problem = _unreadable(Path(parent))
        if problem:
            raise ValueError(f"{parent} is no complete model: {problem}")
        return Path(parent)
    return str(parent)


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
        return self.encoder.encode(self.heldout, self.heldout.keys[:count], max_tokens=max_tokens, reply=False)

    def heldout_rows(self, max_tokens: int) -> list[dict[str, Any]]:
        """All held-out rows with their replies."""
        return self.encoder.encode(self.heldout, self.heldout.keys, max_tokens=max_tokens)


def load_split(settings: RunSettings) -> Holdout:
    """Load the dataset folder and split it, the same way in every script; `n` limits what is trained on.

    Raises:
        ValueError, FileNotFoundError: bad data, missing folder, more held out or asked for than there is.
    """
    bounds = tuple(settings.grid_sizes) or None
    try:
        data = ArcDataset.load_from_local_json(
            settings.dataset_dir, sizes=tuple(settings.sizes), seed=settings.dataset_seed, grid_sizes=bounds
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; name yours with --dataset_dir, or make one to try with: python demo/make_dataset.py --out "
            f"{settings.dataset_dir}"
        ) from None
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


def stage_tokenizer(run: StageRun) -> Any:
    """The tokenizer of a stage: its parent's, cut as the prepared base's will be where that is not made yet."""
    tokenizer = load_tokenizer(run.parent)
    if run.to_prepare is not None and not run.settings.full_vocab:
        from transformers import AutoConfig

        tokenizer, _ = cut_tokenizer(tokenizer, config_token_ids(AutoConfig.from_pretrained(str(run.parent))))
    return tokenizer


def load_data(run: StageRun) -> StageData:
    """Load and split the data and make the rows that are trained on. What is left out is counted and printed.

    Raises:
        ValueError, FileNotFoundError: bad data, or nothing that fits `max_seq_length`.
    """
    settings, tokenizer = run.settings, stage_tokenizer(run)
    split = load_split(settings)
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    samples = TrainingSamples(
        split.train, encoder, settings.max_seq_length, seed=settings.seed, **augmentation(settings)
    )
    if samples.dropped:
        print(
            f"left out: {len(samples.dropped):,} puzzles that do not fit --max_seq_length {settings.max_seq_length} "
            f"with one demonstration ({', '.join(samples.dropped[:3])}{', ...' if len(samples.dropped) > 3 else ''})"
        )
    if len(samples) == 0:
        raise ValueError(f"no puzzle fits --max_seq_length {settings.max_seq_length}: raise it, or lower --sizes")
    # New puzzles of trained tasks tell whether training works; whole held-out tasks are kept for the evaluation.
    heldout = split.seen if len(split.seen.keys) else split.unseen
    long = set(encoder.too_long(heldout, heldout.keys, settings.max_seq_length, turned=False))
    if long:
        print(f"held out: {len(long)} of {len(heldout.keys)} puzzles do not fit --max_seq_length and are not measured")
        heldout = heldout.change_keys([key for key in heldout.keys if key not in long])
    return StageData(split, samples, encoder, tokenizer, heldout)


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


def planned_rows(run: StageRun, data: StageData, rows_per_step: int) -> int:
    """Rows of as many epochs as the training may enter: each epoch has views of its own."""
    rows, settings = len(data.samples), run.settings
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps * rows_per_step / rows
    return rows * (math.ceil(epochs) + 1)  # one more: a trainer counts an epoch's last, short batch as a step


def sft_trainer(model: Any, run: StageRun, data: StageData, collator: InputMaskingDataCollator) -> Any:
    """The trainer of a supervised stage: UnslothTrainer on the Unsloth engine, transformers' Trainer otherwise.

    Both have the same parameter groups (`embedding_learning_rate` for embed_tokens and lm_head), order and views.
    """
    settings, precision = run.settings, run.precision
    heldout = data.heldout_rows(settings.max_seq_length)
    measured = settings.eval_steps > 0 and len(heldout) > 0
    arguments = {
        **common_arguments(run),
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
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
        train = lazy_dataset(data.samples, planned_rows(run, data, batch_size(settings)))
        evaluation = lazy_dataset(heldout, len(heldout))
    sampler = EpochSampler(len(data.samples), settings.seed)

    class StageTrainer(base):
        """The engine's trainer with this pipeline's order of rows and learning rates."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochSampler:
            return sampler

        def create_optimizer(self, model: Any = None) -> Any:
            if precision.engine == "unsloth":  # its own has the same two groups
                return super().create_optimizer() if model is None else super().create_optimizer(model)
            if self.optimizer is None:
                self.optimizer = optimizer_with_embedding_rate(self.model, self.args)
            return self.optimizer

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
    """Print one prompt, how many there are and how long prompts and completions may be."""
    settings = run.settings
    completions = batch_size(settings)
    row = PromptRows(data).__getitems__([0])[0]
    print(f"key {row['key']}\n{row['prompt']}")
    print(
        f"{len(data.samples):,} prompts, with their replies up to {settings.max_seq_length} tokens; completions of up "
        f"to {max_completion_length}; a step: {completions // settings.num_generations} prompts x "
        f"{settings.num_generations} completions; {settings.max_steps} steps"
    )


def reward_functions(judge: Callable[[str, str], Any], tokenizer: Any) -> list[Callable[..., list[float]]]:
    """The reward, and the exact match beside it (to be logged with weight 0), as trl calls them.

    Both read `completion_ids`: trl's decoded `completions` have lost their end tokens, so a reply that was cut off
    would look like one that ended.

    Args:
        judge: given a view's key and a whole reply as text, returns an object with `reward` and `exact`.
        tokenizer: decodes the ids, end tokens included.
    """

    def verdicts(completion_ids: list[list[int]], keys: list[str]) -> list[Any]:
        replies = tokenizer.batch_decode(completion_ids, skip_special_tokens=False)
        return [judge(key, reply) for key, reply in zip(keys, replies, strict=True)]

    def grid_reward(completion_ids: list[list[int]], key: list[str], **_: Any) -> list[float]:
        return [verdict.reward for verdict in verdicts(completion_ids, key)]

    def exact_match(completion_ids: list[list[int]], key: list[str], **_: Any) -> list[float]:
        return [float(verdict.exact) for verdict in verdicts(completion_ids, key)]

    return [grid_reward, exact_match]


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
    arguments.embedding_learning_rate = settings.embedding_learning_rate
    optimizer = None  # trl makes it
    if set(settings.target_modules) & set(EMBEDDING_MODULES):
        optimizer = optimizer_with_embedding_rate(model, arguments)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_functions,
        args=arguments,
        train_dataset=lazy_dataset(
            PromptRows(data), planned_rows(run, data, batch_size(settings) // settings.num_generations)
        ),
        optimizers=(optimizer, None),
        processing_class=data.tokenizer,
    )
    if precision.engine == "transformers":
        train_in_float32(trainer.model)  # trl rounds the trainable weights of a 4-bit base to bfloat16
    return trainer


def optimizer_with_embedding_rate(model: Any, arguments: Any) -> Any:
    """An optimizer with Unsloth's two groups: fully trained embeddings at their own rate, LoRA at the main one.

    Args:
        model: a peft model.
        arguments: of a trainer, with `embedding_learning_rate`.
    """
    from transformers import Trainer

    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".modules_to_save." in name].append(parameter)
    rates = {False: arguments.learning_rate, True: arguments.embedding_learning_rate}
    optimizer = cls(
        [
            {"params": parameters, "lr": rates[embedding], "weight_decay": arguments.weight_decay}
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
    return optimizer


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
        "use_cpu": not torch.cuda.is_available(),
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


def check_arguments(run: StageRun) -> None:
    """Let transformers check what it knows best (schedules, optimizers, reporters), before a model is loaded.

    Raises:
        ValueError: a value that no trainer would take.
    """
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        arguments = TrainingArguments(**common_arguments(run))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # says if its package is missing
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"--report_to {run.settings.report_to}: {str(error).splitlines()[0]}") from None


def watch(trainer: Any, run: StageRun, measure: Callable[[], dict[str, float]] | None) -> None:
    """Add tokens/s and measurements on held-out puzzles to a trainer's logs, and keep all of them in metrics.jsonl.

    Args:
        trainer: any trainer of the pipeline.
        run: gives the folder and the intervals.
        measure: called every `eval_steps` steps and at the end; its numbers are logged.
    """
    from transformers import TrainerCallback

    class Metrics(TrainerCallback):
        """Adds to the logs and keeps them."""

        def __init__(self) -> None:
            self.path = run.work / "metrics.jsonl"
            self.seen: tuple[float, int] | None = None
            self.paused = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.path.is_file():
                # A continued run repeats the steps after its checkpoint: their lines are written anew.
                kept = [r for r in read_metrics(self.path) if r["step"] <= state.global_step and state.global_step]
                number = len(list(run.work.glob("metrics-*.jsonl")))
                self.path.rename(run.work / f"metrics-{number}.jsonl")
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
            record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            # The time of a measurement is not training time.
            self.paused += (metrics or {}).get("eval_runtime", 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = state.global_step == state.max_steps
            if measure is not None and (last or state.global_step % run.settings.eval_steps == 0):
                begin = time.perf_counter()
                numbers = measure()
                self.paused += time.perf_counter() - begin
                state.log_history.append({**numbers, "step": state.global_step})
                # Not Trainer.log: trl's would close its averages of the step here.
                trainer.callback_handler.on_log(args, state, control, numbers)  # sets should_log to False
            if last:  # also where the intervals do not divide the steps
                control.should_log = True
                control.should_evaluate = args.eval_strategy != "no"

    # First, so that what it adds reaches the console and the reporters, which come after it.
    trainer.callback_handler.callbacks.insert(0, Metrics())


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
    size = settings.per_device_eval_batch_size
    return lambda: exact_match(model, run.precision.engine, data.tokenizer, data.heldout, prompts, batch_size=size)


# ---------------------------------------------------------------------------------------------------------------------
# Train, then merge


class StageRun:
    """One run of a stage: what is there already, what it starts from, training, saving, merging.

    Args:
        stage: names.
        settings: resolved settings.

    Attributes:
        precision: engine and formats of the training.
        parent: what training starts from (None if the adapter is there already).
        to_prepare: the folder of the prepared base if `begin` has to make it, else None.
        work: folder of checkpoints and logs.
    """

    def __init__(self, stage: Stage, settings: RunSettings):
        """Look at what is there, without writing; a user's mistake ends the program with one message."""
        self.stage, self.settings = stage, settings
        self.lora, self.merged, self.work = stage.lora(settings), stage.merged(settings), stage.checkpoints(settings)
        self.parent: Path | str | None = None
        self.to_prepare: Path | None = None
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
            check_arguments(self)
            self.parent = find_parent(stage, settings)
            if stage.parent == "prepared" and self.parent == _as_given(settings.base_model):
                self.to_prepare = Path(settings.output_dir) / f"{settings.artifact_prefix}-prepared"
            four_bit = ", base in 4 bits" if self.precision.load_in_4bit else ""
            formats = f"{self.precision.engine}, {self.precision.dtype}{four_bit}"
            print(f"{stage.script}: {self.parent} -> {self.lora} ({formats})")
            print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
            if self.precision.load_in_4bit and read_manifest(self.parent).get("merged_onto") == "quantised":
                print(
                    "note: the parent was merged onto its quantised base and is quantised again here, which rounds "
                    "small changes away; merged with --merge_base original it keeps them (benchmarks/README.md)"
                )

    def needs_training(self) -> bool:
        """Whether the adapter is not there yet."""
        return self.parent is not None

    def begin(self) -> None:
        """All checks are done: end here in a dry run, else make the prepared base if there is none yet."""
        if self.settings.dry_run:
            print("dry run: settings, data, model folder and masks are fine")
            sys.exit(0)
        with user_errors():
            self.work.mkdir(parents=True, exist_ok=True)
            if self.to_prepare is not None:
                print(f"preparing {self.parent} -> {self.to_prepare}")
                with new_folder(self.to_prepare) as beside:
                    done = prepare_base(self.parent, beside, self.settings.full_vocab)
                    write_manifest(beside, provenance("prepared", self.settings, **done))
                self.parent, self.to_prepare = self.to_prepare, None

    def train(self, trainer: Any, data: StageData) -> None:
        """Train, from the last complete checkpoint of an interrupted run if there is one, and print a summary.

        Args:
            trainer: any trainer of the pipeline.
            data: what it trains on; a checkpoint of a run on other data is refused.
        """
        import torch

        with user_errors():
            checkpoint = self._last_checkpoint(data)
        before = {"global_step": 0, "max_steps": -1, "num_input_tokens_seen": 0}
        if checkpoint is not None:
            print(f"continuing from {checkpoint}")
            before = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if before["global_step"] == before["max_steps"]:
                # Training was done, only not saved yet. A trainer that resumes here would take one step more.
                trainer._load_from_checkpoint(str(checkpoint))
                return
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state, seconds = trainer.state, result.metrics.get("train_runtime", 0.0)
        losses = [record["loss"] for record in state.log_history if "loss" in record]
        tokens = state.num_input_tokens_seen - before["num_input_tokens_seen"]
        memory = ""
        if torch.cuda.is_available():
            memory = f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        print(
            f"trained {state.global_step - before['global_step']} steps to step {state.global_step} in "
            f"{format_duration(seconds)}: last loss {losses[-1] if losses else math.nan:.4f}, {tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s{memory}"
        )

    def _last_checkpoint(self, data: StageData) -> Path | None:
        # What changes the course of the training must be what the checkpoint was made with.
        course = {k: v for k, v in asdict(self.settings).items() if k not in NOT_THE_COURSE}
        course |= {
            "precision": asdict(self.precision),
            "data": data.split.train.content_hash(),
            "parent": fingerprint(self.parent),
        }
        course = json.loads(json.dumps(course))
        path = self.work / "course.json"
        # trainer_state.json is what the trainer writes last.
        found = {int(p.parent.name[11:]): p.parent for p in self.work.glob("checkpoint-[0-9]*/trainer_state.json")}
        if found and path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(k for k in course if before.get(k) != course[k])
            if changed:
                raise ValueError(
                    f"{self.work} holds checkpoints of a run with other settings ({', '.join(changed)}): use those, or "
                    "move the folder away to start anew"
                )
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(course, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
        return found[max(found)] if found else None

    def save(self, model: Any, data: StageData) -> None:
        """Write the adapter with its tokenizer, manifest, metrics and curves."""
        from report_tools import plot_metrics

        hashes = {"data_hash": data.split.train.content_hash(), "parent_hash": fingerprint(self.parent)}
        manifest = provenance(self.stage.name, self.settings, **hashes)
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
            parent = self._where_the_parent_is()
            with new_folder(self.merged) as beside:
                done = merge_adapter(self.lora, beside, base=parent, merge_base=self.settings.merge_base)
                # How the adapter was trained stands in its own manifest; this run's flags had no part in it.
                made = read_manifest(self.lora) | {"adapter": str(self.lora.resolve()), **done, "base": str(parent)}
                write_manifest(beside, made)
        print(f"saved {self.merged}: merged onto the {done['merged_onto']} base in {time.perf_counter() - begin:.0f} s")
        if done["merged_onto"] == "quantised":
            print(
                "note: a next stage that quantises this model again loses its small changes (benchmarks/README.md); to "
                f"keep them, move {self.merged} away and run this again with --merge_base original"
            )

    def _where_the_parent_is(self) -> Path | str:
        # The adapter names its base by an absolute path; a whole output folder may have been moved or copied since.
        if self.parent is not None:
            return self.parent
        output, prefix = Path(self.settings.output_dir), self.settings.artifact_prefix
        name = "prepared" if self.stage.parent == "prepared" else f"{self.stage.parent}-merged"
        here = output / f"{prefix}-{name}"
        if read_manifest(self.lora).get("parent_hash") == fingerprint(here):
            return here
        from peft import PeftConfig

        named = PeftConfig.from_pretrained(str(self.lora)).base_model_name_or_path
        if Path(named).is_absolute() and not Path(named).is_dir():
            raise FileNotFoundError(f"{self.lora} was trained on {named}, which is not there: bring it back to merge")
        return named


def _as_given(base_model: str | None) -> Path | str | None:
    return Path(base_model) if base_model and Path(base_model).is_dir() else base_model


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
