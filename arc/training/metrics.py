"""What is watched during a training: tokens per second, and measurements on held-out puzzles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arc.runs.processes import gather, share
from arc.runs.settings import RunSettings
from arc.training.data import StageData
from arc.training.stage import StageContext


def watch(trainer: Any, run: StageContext[RunSettings], measure: Callable[[], dict[str, float]] | None) -> None:
    """Add tokens/s and measurements on held-out puzzles to a trainer's logs, and write all logs to metrics.jsonl.

    `measure` is called every `eval_steps` steps and at the end; its numbers are logged.
    """
    from arc.training.callbacks import Metrics

    # First, so that its numbers reach the console and the reporters, which come after it.
    trainer.callback_handler.callbacks.insert(0, Metrics(trainer, run, measure))


def heldout_measure(
    model: Any, run: StageContext[RunSettings], data: StageData
) -> Callable[[], dict[str, float]] | None:
    """A function that decodes held-out puzzles greedily and returns the share solved; None if there are none."""
    from arc.decoding.greedy import exact_match

    settings = run.settings
    prompts = data.prompts(settings.eval_puzzles, settings.max_seq_length) if settings.eval_puzzles else []
    if not prompts or not settings.eval_steps:
        return None
    shared = share(prompts)  # of this process

    def measure() -> dict[str, float]:
        numbers = {}
        if shared:
            size = settings.per_device_eval_batch_size
            numbers = exact_match(model, run.precision.engine, data.tokenizer, data.heldout, shared, batch_size=size)
        if len(shared) == len(prompts):
            return numbers
        counted = gather((len(shared), numbers))
        names = counted[0][1]  # the main process always has prompts
        return {name: sum(count * each[name] for count, each in counted if count) / len(prompts) for name in names}

    return measure
