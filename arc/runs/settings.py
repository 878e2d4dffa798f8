"""Settings of a run: names, defaults, help texts, parsing of flags and `--config` files, and checks.

Each stage script adds its own settings to RunSettings. trl's TrlParser does not fit: a file's values become defaults
that it does not check, and a file may set environment variables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from arc.models.lora import EMBEDDING_MODULES, LINEAR_MODULES
from arc.runs.processes import fail, start

# Settings of where and how a run is done and watched. They do not change its result.
NOT_THE_COURSE = (
    "base_model", "dataset_dir", "extra_dataset_dirs", "output_dir", "artifact_prefix", "engine", "dtype",
    "load_in_4bit", "dry_run", "overwrite", "merge_base", "micro_batch_size", "padding_free", "compile_layers",
    "gradient_checkpointing", "shared_prompts",
    "logging_steps", "eval_steps", "eval_puzzles", "per_device_eval_batch_size", "save_steps", "save_total_limit",
    "report_to", "dataloader_num_workers",
)  # fmt: skip


# Settings with few values; upper case is accepted, the value becomes lower case.
CHOICES = {
    "engine": ("auto", "unsloth", "transformers"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "merge_base": ("quantised", "original"),
    "tp": ("all", "true", "false"),
    "rt": ("all", "true", "false"),
}


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and the text that --help shows."""
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DataSettings:
    """Which puzzles are used and which are held out. Every script has these flags, so that all agree."""

    dataset_dir: str = setting(
        "dataset", "folder of task files: lists of input/output pairs, or official train/test files"
    )
    n: int | None = setting(
        None, "base puzzles to train on, of dataset_dir; default: all that its files yield, no example used twice"
    )
    extra_dataset_dirs: list[str] = setting(
        [], "more folders of task files to train on (other datasets, generated puzzles); nothing of them is held out"
    )
    sizes: list[int] = setting([6], "demonstration pairs of a puzzle; several numbers are taken in turn")
    grid_sizes: list[int] = setting([], "smallest and largest side of a grid; other pairs are left out; default: all")
    dataset_seed: int = setting(42, "seed of the choice of examples for each puzzle")
    # Held out: no stage trains on what the evaluation uses
    holdout_examples: int = setting(64, "puzzles held out, spread evenly over the trained tasks")
    holdout_tasks: int = setting(0, "whole tasks held out")
    holdout_seed: int = setting(42, "seed of the split")

    def problems(self) -> list[str]:
        """Problems of the settings that only this script has, one line each."""
        return []


@dataclass
class RunSettings(DataSettings):
    """Settings of all stages: folders, how a run is done, LoRA, training. Each stage adds its own."""

    # Where
    base_model: str | None = setting(None, "folder or hub name to start from; default: the merge of the stage before")
    output_dir: str = setting("output", "folder of all artifacts, the same for all stages")
    artifact_prefix: str = setting("Llama-3.2-1B", "first part of the artifacts' names")
    # How
    engine: str = setting("auto", "unsloth, transformers, or auto: unsloth where there is CUDA")
    load_in_4bit: bool | None = setting(None, "quantise the frozen base; default: on unsloth only")
    dtype: str = setting("auto", "bfloat16, float16, float32, or auto: the best that this machine supports")
    full_vocab: bool = setting(False, "keep the whole vocabulary instead of one token per cell")
    merge_base: str = setting(
        "quantised",
        "quantised: merge onto the 4-bit base of the training; original: onto its 16-bit weights, which keeps small "
        "changes if the next stage quantises again",
    )
    seed: int = setting(42, "seed of order and augmentation")
    dry_run: bool = setting(False, "check settings, data, model folder and masks, then stop")
    overwrite: bool = setting(
        False,
        "make damaged or outdated artifacts of this stage again; the old ones are renamed, never deleted",
    )
    # Views
    tp: str = setting("all", "transposed views: all, true (drawn for each sample) or false")
    rt: str = setting("all", "rotated views: all, true (drawn for each sample) or false")
    perm: bool = setting(True, "a new colour permutation for each sample and epoch")
    perm_share: float = setting(1.0, "share of the samples whose colours are permuted")
    keep_background: bool = setting(False, "colour permutations do not change colour 0")
    shfl_ex: bool = setting(True, "a new order of the demonstrations for each sample and epoch")
    max_seq_length: int = setting(1536, "longest row in tokens; demonstrations are dropped to fit")
    # LoRA
    lora_r: int = setting(512, "rank; it does not apply to embed_tokens and lm_head, which are trained in full")
    lora_alpha: float = setting(24.0, "the update is scaled by alpha / sqrt(r)")
    lora_dropout: float = setting(0.0, "dropout in front of the LoRA matrices")
    use_rslora: bool = setting(True, "rank-stabilised scaling; false: alpha / r")
    target_modules: list[str] = setting(LINEAR_MODULES + EMBEDDING_MODULES, "layers that LoRA is added to")
    random_state: int = setting(42, "seed of LoRA's initial values")
    # Training
    per_device_train_batch_size: int = setting(4, "times gradient_accumulation_steps: samples of one step")
    gradient_accumulation_steps: int = setting(2, "see per_device_train_batch_size; --micro_batch_size divides a step")
    num_train_epochs: float = setting(1.0, "epochs; an epoch holds every base puzzle in each of its enumerated views")
    max_steps: int = setting(-1, "stop after this many steps; -1: when the epochs are done")
    learning_rate: float = setting(1e-4, "highest rate of the LoRA matrices")
    embedding_learning_rate: float = setting(1e-5, "highest rate of embed_tokens and lm_head")
    lr_scheduler_type: str = setting("cosine", "a schedule of transformers")
    warmup_ratio: float = setting(0.25, "share of the steps in which the rate rises")
    optim: str = setting(
        "adamw_8bit", "an optimizer of transformers, or muon: for LoRA's matrices, beside adamw_torch_fused"
    )
    adam_beta2: float = setting(0.999, "of Adam's mean of squares: lower for short trainings at high rates")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    # How a step is computed, which makes no difference to what is learned (batch_planning)
    micro_batch_size: int | None = setting(
        None,
        "samples of one forward pass on each GPU; must divide the samples of a step; default: as many as fit the GPU's "
        "memory, on a CPU per_device_train_batch_size",
    )
    gradient_checkpointing: bool | None = setting(
        None, "recompute activations: slower, less memory; default: where memory is short, and on CPUs"
    )
    fold_lora: bool = setting(
        False,
        "add LoRA's matrices to a layer's weight before the product (engine transformers, not in 4 bits): faster for "
        "ranks near the layers' width; in 16 bits, changes below a weight's last digit are lost",
    )
    # Watching
    logging_steps: int = setting(10, "steps between log lines")
    eval_steps: int = setting(500, "steps between measurements on the held-out puzzles; 0: never")
    eval_puzzles: int = setting(32, "held-out puzzles decoded for the exact match; 0: none")
    per_device_eval_batch_size: int = setting(8, "held-out puzzles measured or decoded at once")
    save_steps: int | None = setting(
        None, "steps between checkpoints; default: a checkpoint every five minutes; 0: no checkpoints"
    )
    save_total_limit: int = setting(2, "checkpoints kept")
    report_to: str = setting("none", "none, tensorboard, wandb, ...")
    dataloader_num_workers: int | None = setting(
        None,
        "processes that make batches; 0: the main process makes them; default: 2 if a step has 32 samples or more on "
        "each GPU (stages 1 and 2, engine transformers), else 0",
    )

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass
class SupervisedSettings(RunSettings):
    """Further settings of stages 1 and 2: how a step is computed."""

    padding_free: bool | None = setting(
        None,
        "put the samples of a forward pass into one row without padding, with separate attention; default: on GPUs "
        "that support it",
    )
    compile_layers: bool | None = setting(
        None,
        "compile the layers (engine transformers), which takes a minute; default: on a GPU if that saves time",
    )


def course_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the result of a training; of a step only its samples, however they are divided."""
    # With the guard, measurements decide which adapter is the best.
    deciding = ("eval_steps", "eval_puzzles") if values.get("collapse_guard") else ()
    course = {name: value for name, value in values.items() if name not in NOT_THE_COURSE or name in deciding}
    parts = [course.pop(name, 1) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    return course | {"samples_per_step": parts[0] * parts[1]}


def default_course(cls: type) -> dict[str, Any]:
    """`course_settings` of the defaults: the values in artifacts that are older than a setting."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    return course_settings(json.loads(json.dumps(defaults)))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written; each setting under one name, with its default unless its text says one."""

    def add_argument(self, action: argparse.Action) -> None:
        """Add a setting, but not `--no_NAME`, which is `--NAME false`."""
        if not any(name.startswith("--no_") for name in action.option_strings):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or action.metavar:
            return super()._format_action_invocation(action)
        # The form with "-" for "_" works too; showing both would make the list twice as long.
        value = "true|false" if isinstance(action.default, bool) else "VALUE"
        return f"{action.option_strings[0]} {self._format_args(action, value)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, [], argparse.SUPPRESS) or "default:" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.lower() if isinstance(default, bool) else shown})"


def parse_settings(cls: type, argv: Sequence[str] | None = None) -> Any:
    """Parse flags (`--learning_rate 1e-4`) and an optional `--config file.yaml` into a settings dataclass.

    Flags win over the file. All problems are reported in one message, with exit code 2. A script calls this first: it
    joins the processes that a launcher started, so that only one of them prints.
    """
    with user_errors():
        start()  # before transformers is imported: it keeps the stderr of that moment
    from transformers.hf_argparser import HfArgumentParser

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show becomes "?", not a traceback
            stream.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        cls, description=sys.modules[cls.__module__].__doc__, formatter_class=HelpFormatter,
        usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; flags win over it")
    with user_errors():
        parser.error = _raise_value_error
        config, _ = _config_parser().parse_known_args(argv)
        if config.config is not None:
            # Put before the flags: the parser converts and checks both in the same way, and later flags win.
            argv = [*_as_flags(_read_config(Path(config.config), cls)), *argv]
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(f"unknown flags: {' '.join(unknown)}; see --help")
        settings = cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)})
        for name in CHOICES:
            if hasattr(settings, name):
                setattr(settings, name, str(getattr(settings, name)).lower())
        problems = find_problems(settings)
        if problems:
            raise ValueError("\n".join(["settings that cannot be used:", *(f"  --{p}" for p in problems)]))
    return settings


def _raise_value_error(message: str) -> None:
    raise ValueError(f"{message}; see --help")


def _read_config(path: Path, cls: type) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader that refuses a name that stands twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(name) for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{path}: {', '.join(twice)} stands there twice")
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader) or {}  # noqa: S506 - it is a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a {type(values).__name__}, expected lines of `name: value`")
    unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; see --help for the names")
    lists = {f.name for f in fields(cls) if "list" in str(f.type)}
    wrong = sorted(name for name, value in values.items() if isinstance(value, (list, dict)) and name not in lists)
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)}: found several values, expected one")
    return values


def _config_parser() -> argparse.ArgumentParser:
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


def find_problems(settings: DataSettings) -> list[str]:
    """All problems of the settings, one line each; empty if there are none."""
    checks = _data_checks(settings)
    if isinstance(settings, RunSettings):
        checks |= _run_checks(settings)
    for name, choices in CHOICES.items():
        if hasattr(settings, name):
            checks[name] = getattr(settings, name) in choices, " or ".join(choices)
    return failed_checks(settings, checks) + settings.problems()


WHOLE_FROM_0, WHOLE_FROM_1 = "a whole number from 0", "a whole number from 1"
SEED = "a whole number from 0 to below 2**32"


def is_seed(value: int) -> bool:
    """Whether every random generator accepts it."""
    return 0 <= value < 2**32


def is_name(value: str | None) -> bool:
    """Whether it is not set, or not blank."""
    return value is None or bool(value.strip())


def _data_checks(settings: DataSettings) -> dict[str, tuple[bool, str]]:
    bounds = settings.grid_sizes
    return {
        "dataset_dir": (is_name(settings.dataset_dir), "a name"),
        "extra_dataset_dirs": (all(map(is_name, settings.extra_dataset_dirs)), "names"),
        "n": (settings.n is None or settings.n >= 1, WHOLE_FROM_1),
        "sizes": (len(settings.sizes) > 0 and min(settings.sizes) >= 1, "whole numbers from 1"),
        "grid_sizes": (
            not bounds or (len(bounds) == 2 and 1 <= bounds[0] <= bounds[1]),
            "two bounds, such as 1 10",
        ),
        "dataset_seed": (is_seed(settings.dataset_seed), SEED),
        "holdout_examples": (settings.holdout_examples >= 0, WHOLE_FROM_0),
        "holdout_tasks": (settings.holdout_tasks >= 0, WHOLE_FROM_0),
        "holdout_seed": (is_seed(settings.holdout_seed), SEED),
    }


def _run_checks(settings: RunSettings) -> dict[str, tuple[bool, str]]:
    checks: dict[str, tuple[bool, str]] = {}

    def check(name: str, good: bool, expected: str) -> None:
        checks[name] = good, expected

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
        check(name, getattr(settings, name) >= 1, WHOLE_FROM_1)
    for name in ("eval_steps", "eval_puzzles"):
        check(name, getattr(settings, name) >= 0, WHOLE_FROM_0)
    workers = settings.dataloader_num_workers
    check("dataloader_num_workers", workers is None or workers >= 0, WHOLE_FROM_0)
    check("base_model", is_name(settings.base_model), "a folder or hub name")
    check("output_dir", is_name(settings.output_dir), "a name")
    prefix = settings.artifact_prefix
    check("artifact_prefix", bool(prefix.strip()) and Path(prefix).name == prefix, "a name without folders")
    for name in ("seed", "random_state"):
        check(name, is_seed(getattr(settings, name)), SEED)
    check("save_steps", settings.save_steps is None or settings.save_steps >= 0, WHOLE_FROM_0)
    check("max_steps", settings.max_steps == -1 or settings.max_steps >= 1, f"{WHOLE_FROM_1}, or -1 for no limit")
    step, micro = settings.samples_per_step, settings.micro_batch_size
    check("micro_batch_size", micro is None or (micro >= 1 and step % micro == 0), f"a divisor of the {step} of a step")
    check("max_seq_length", settings.max_seq_length >= 16, "a whole number from 16")
    check("weight_decay", math.isfinite(settings.weight_decay) and settings.weight_decay >= 0, "a number from 0")
    check("adam_beta2", 0 <= settings.adam_beta2 < 1, "a share from 0 to below 1")
    check("warmup_ratio", 0 <= settings.warmup_ratio < 1, "a share from 0 to below 1")
    check("perm_share", 0 <= settings.perm_share <= 1, "a share from 0 to 1")
    check("lora_dropout", 0 <= settings.lora_dropout < 1, "a share from 0 to below 1")
    unknown = [m for m in settings.target_modules if m not in LINEAR_MODULES + EMBEDDING_MODULES]
    good = not unknown and any(m in LINEAR_MODULES for m in settings.target_modules)
    check("target_modules", good, f"names among {' '.join(LINEAR_MODULES + EMBEDDING_MODULES)}, not only embeddings")
    return checks


def failed_checks(settings: DataSettings, checks: dict[str, tuple[bool, str]]) -> list[str]:
    """One line for each setting that failed its check: (whether it is good, what is expected)."""
    return [
        f"{name} is {getattr(settings, name)!r}: expected {expected}"
        for name, (good, expected) in checks.items()
        if not good
    ]


@contextlib.contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Turn a user's mistake (bad values, missing or unwritable files) into one message and exit code 2.

    Meant for the set-up of a run. Errors of the work itself are bugs, which keep their traceback, or trouble of the
    machine (`troubles.machine_errors`). If ARC_TRACEBACK is set in the environment, all errors keep it.

    Args:
        kinds: the errors that are a user's mistakes.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get("ARC_TRACEBACK"):
            raise
        fail(f"error: {error}", 2)
