"""How a step is computed on this machine: samples of a forward pass, checkpointing, packing, compiling.

The settings alone decide what a step learns. How it is divided into forward passes changes only its time: small passes
of a 1B model keep a large GPU waiting for its host. `plan_batches` tries passes of the model, takes the largest that
fit the free memory, and times them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from arc.models.loading import Precision
from arc.models.lora import set_gradient_checkpointing
from arc.runs.needs import format_duration
from arc.runs.processes import agree, divide_batch, process_count
from arc.runs.settings import RunSettings
from arc.training.stage import BatchPlan
from arc.training.trials import Trial

COMPILE_FROM = 600.0  # seconds of training from which compiling pays: it takes a minute, and saves a third of the time


def plan_batches(trial: Trial[RunSettings], *, steps: int, earlier: BatchPlan | None = None) -> BatchPlan:
    """Decide how a step is computed, by trying passes of the model; the model is left as the plan says.

    On CUDA the plan is the largest division of a step that fits the free memory: without checkpointing if that fits,
    else the faster of the two. On a CPU a step is divided as the settings say, and timed where the trial wants that.
    All processes of a run decide alike.

    Compiling pays where many `steps` are ahead. The `earlier` plan, of the checkpoint that the training continues from,
    stays if it fits and settings allow. Raises torch.OutOfMemoryError if not even one sample fits.
    """
    import torch

    model, settings, engine = trial.model, trial.run.settings, trial.run.precision.engine
    samples = settings.samples_per_step // process_count()
    compile_setting = getattr(settings, "compile_layers", None)  # of all stages, each with a default of its own
    cuda, compiled = torch.cuda.is_available(), bool(compile_setting)
    if compiled:
        compile_layers(model)

    def fits(size: int, on: bool, must: bool) -> tuple[int | None, bool]:
        set_gradient_checkpointing(model, engine, on)
        return trial.fits(size, samples // size, must)

    sizes, checkpointing = choices(settings, samples, cuda, earlier)
    divisions: Sequence[tuple[int, bool, int | None]] = [(sizes[0], checkpointing[0], None)]
    if cuda:
        divisions = divisions_that_fit(sizes, checkpointing, samples, fits)
    may_compile = cuda and engine == "transformers" and compile_setting is None
    plans = [BatchPlan(size, samples // size, on, trial.padding_free, compiled, peak) for size, on, peak in divisions]
    if len(plans) > 1 or may_compile or trial.tells_time:
        for at, plan in enumerate(plans):
            set_gradient_checkpointing(model, engine, plan.gradient_checkpointing)
            plans[at] = replace(plan, seconds_per_step=_slowest(trial.seconds_per_step(plan)))
        plans.sort(key=lambda plan: plan.seconds(1))
    best = plans[0]
    set_gradient_checkpointing(model, engine, best.gradient_checkpointing)
    if may_compile and best.seconds(steps) > COMPILE_FROM and not best.gradient_checkpointing:
        best = _compiled_if_faster(model, trial, best)
    trial.release()
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # the peak that is printed later is the training's
    return best


def choices(
    settings: RunSettings, samples: int, cuda: bool, earlier: BatchPlan | None = None
) -> tuple[Sequence[int], Sequence[bool]]:
    """The choices that the settings leave: samples of a forward pass, and checkpointing; the best first.

    `samples` are those of a step in each process; `earlier` is the plan so far, in a run that continues.
    """
    if settings.micro_batch_size is not None:
        sizes = [settings.micro_batch_size]
    elif not cuda:
        sizes = [divide_batch(settings.per_device_train_batch_size, settings.gradient_accumulation_steps)[0]]
    elif earlier is not None and samples % earlier.micro_batch_size == 0:
        sizes = [size for size in divisors(samples) if size <= earlier.micro_batch_size]
    else:
        sizes = divisors(samples)
    if settings.gradient_checkpointing is not None:
        return sizes, [settings.gradient_checkpointing]
    if not cuda:
        return sizes, [True]  # as published: main memory cannot be tried without risk to the whole machine
    return sizes, [True] if earlier is not None and earlier.gradient_checkpointing else [False, True]


def divisions_that_fit(
    sizes: Sequence[int], checkpointing: Sequence[bool], samples: int,
    fits: Callable[[int, bool, bool], tuple[int | None, bool]],
) -> list[tuple[int, bool, int | None]]:  # fmt: skip
    """The largest size that fits, for each way of checkpointing that may be the fastest.

    `sizes` and `checkpointing` are in the order in which they are tried, `samples` those of a step. `fits` gets a size,
    checkpointing, and whether it is the last choice, which has to be taken. It returns the memory in bytes and whether
    the device has it. The result has size, checkpointing and memory of each.
    """
    divisions: list[tuple[int, bool, int | None]] = []
    for on in checkpointing:
        for size in sizes:
            must = not divisions and (size, on) == (sizes[-1], checkpointing[-1])
            peak, does_fit = fits(size, on, must)
            if does_fit:
                divisions.append((size, on, peak))
                break
        if divisions and divisions[-1][0] == samples:
            break  # nothing is faster than all samples at once without recomputing
    return divisions


def divisors(number: int) -> list[int]:
    """All divisors of a number, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def _compiled_if_faster(model: Any, trial: Trial[RunSettings], plan: BatchPlan) -> BatchPlan:
    begin = time.perf_counter()
    compile_layers(model)
    try:
        seconds = trial.seconds_per_step(plan)
    except Exception as error:  # noqa: BLE001 - no compiler on the machine, or one that cannot cope: not needed
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        print(f"note: the layers cannot be compiled here ({reason}); training goes on without")
        seconds = 1e6  # then no process compiles
    seconds = _slowest(seconds)
    if seconds > plan.seconds(1):
        compile_layers(model, undo=True)
        return plan
    print(f"compiled the layers in {format_duration(time.perf_counter() - begin)}")
    return replace(plan, compile_layers=True, seconds_per_step=seconds)


def _slowest(seconds: float) -> float:
    # Of all processes: they wait for each other.
    return agree(round(1e6 * seconds))[0] / 1e6


def compile_layers(model: Any, undo: bool = False) -> None:
    """Compile each decoder layer of a model, in place, for rows of any length (or undo it); it takes a minute."""
    for module in model.modules():
        if hasattr(module, "self_attn") and hasattr(module, "mlp"):
            if undo:
                module._compiled_call_impl = None  # what nn.Module.compile sets
            else:
                module.compile(dynamic=True)


def faster_way(plan: BatchPlan, precision: Precision, memory: int) -> str | None:
    """A line about flags that are known to be faster than this plan; None if none are. `memory` is in bytes."""
    if precision.engine != "unsloth" or not precision.load_in_4bit or not plan.padding_free:
        return None
    if plan.peak_bytes is None or plan.passes > 1 or plan.gradient_checkpointing or memory < 3 * plan.peak_bytes:
        return None  # 16 bits, and kernels that keep more, took 1.6 times the memory
    return (
        "note: --engine transformers --load_in_4bit false is another training, in 16 bits, and faster on a GPU with so "
        "much memory: see docs/performance.md"
    )
