"""The arguments of the trainers, in transformers' names, and their checks before a model is loaded."""

from __future__ import annotations

import difflib
from typing import Any

from arc.runs.processes import divide_batch, process_count
from arc.runs.settings import RunSettings
from arc.training.optimizers import BESIDE_MUON, MUON
from arc.training.stage import StageContext

MANY_SAMPLES = 32  # of a step of one process: from there on other processes make its batches
SAME_NAMES = (  # in TrainingArguments
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "adam_beta2", "weight_decay",
    "max_grad_norm", "seed", "logging_steps",
)  # fmt: skip


def common_arguments(run: StageContext[RunSettings]) -> dict[str, Any]:
    """Arguments that every trainer of the pipeline gets, in transformers' names."""
    import torch

    settings, precision, plan = run.settings, run.precision, run.plan
    size, accumulation = divide_step(settings)
    checkpointing = settings.gradient_checkpointing is not False
    if plan is not None:
        size, accumulation, checkpointing = plan.micro_batch_size, plan.passes, plan.gradient_checkpointing
    arguments = {name: getattr(settings, name) for name in SAME_NAMES} | {
        "output_dir": str(run.work),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": settings.warmup_ratio,  # transformers 5 reads a number below 1 as a share of all steps
        "optim": BESIDE_MUON if settings.optim == MUON else settings.optim,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "gradient_checkpointing": checkpointing,
        # By the clock unless a number of steps is given, and at the last step; runs/guard.py deletes old checkpoints.
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "remove_unused_columns": False,  # the collator reads reply_spans and key, the reward reads key
        "dataloader_num_workers": settings.dataloader_num_workers or 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # else each batch waits for the last step
        "logging_first_step": True,
        "run_name": run.lora.name,  # the name of the run in W&B and other reporters
        "report_to": [] if settings.report_to == "none" else settings.report_to.split(","),
    }
    if process_count() > 1:
        arguments["ddp_find_unused_parameters"] = False  # every step uses all of them
    if precision.engine == "transformers" or process_count() > 1:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def loader_processes(settings: RunSettings, engine: str) -> int:
    """Processes that make batches ahead: as set, else 2 where the main process would keep a GPU waiting.

    The main process makes 64 samples in 4.4 ms on an idle core: as long as it takes to start a small model's forward
    pass. With Unsloth's rows such processes have not been tried.
    """
    import torch

    if settings.dataloader_num_workers is not None:
        return settings.dataloader_num_workers
    many = settings.samples_per_step // process_count() >= MANY_SAMPLES
    return 2 if many and engine == "transformers" and torch.cuda.is_available() else 0


def divide_step(settings: RunSettings) -> tuple[int, int]:
    """Samples of a forward pass and forward passes of a step, in each process, where nothing is tried.

    Raises ValueError if --micro_batch_size does not divide the samples of a process.
    """
    size, passes = divide_batch(settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    samples, micro = size * passes, settings.micro_batch_size
    if micro is None:
        return size, passes
    if samples % micro:
        raise ValueError(f"--micro_batch_size {micro} does not divide the {samples} samples of each process's step")
    return micro, samples // micro


def check_arguments(run: StageContext[RunSettings]) -> None:
    """Raise ValueError for a schedule, optimizer, reporter or flag that no trainer takes, before a model is loaded."""
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    settings, precision = run.settings, run.precision
    divide_step(settings)
    if getattr(settings, "compile_layers", None) and precision.engine == "unsloth":
        raise ValueError("--compile_layers is for --engine transformers: Unsloth compiles by itself")
    if settings.fold_lora:
        if precision.engine == "unsloth" or precision.load_in_4bit:
            raise ValueError("--fold_lora is for --engine transformers and weights that are not in 4 bits")
        if settings.lora_dropout:
            raise ValueError("--fold_lora true: not beside --lora_dropout, which is of activations")
    for name, known, usual in (
        ("optim", OptimizerNames, ["adamw_8bit", "adamw_torch"]),
        ("lr_scheduler_type", SchedulerType, ["cosine", "linear"]),
    ):
        value, names = getattr(settings, name), [str(member.value) for member in known]
        if value not in names and (name, value) != ("optim", MUON):
            muon = f", or {MUON}" if name == "optim" else ""
            near = ", ".join(difflib.get_close_matches(value, names) or usual)
            raise ValueError(f"--{name} {value}: expected a name that transformers knows, such as {near}{muon}")
    try:
        arguments = TrainingArguments(**common_arguments(run))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # says if its package is missing
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"--report_to {settings.report_to}: {str(error).splitlines()[0][:300]}") from None
