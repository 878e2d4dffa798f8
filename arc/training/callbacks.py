"""Callbacks of the trainers. Imported when a trainer is made: transformers' base class is slow to load."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from arc.puzzles.files import write_atomically
from arc.runs.processes import is_main
from arc.runs.settings import RunSettings
from arc.training.curves import read_metrics
from arc.training.rows import EpochSampler
from arc.training.stage import StageContext


class Plan(TrainerCallback, ExportableState):
    """Writes the batch plan into the checkpoints, where `StageContext.kept_plan` reads it by this class's name."""

    def __init__(self, run: StageContext[RunSettings]):
        self.run = run

    def state(self) -> dict[str, Any]:
        """The plan, for trainer_state.json."""
        return {"args": {}, "attributes": self.run.plan.choice() if self.run.plan is not None else {}}


class ContinuedEpoch(TrainerCallback):
    """Tells the sampler its epoch: the trainer's call gets lost where several processes skip rows that were trained."""

    def __init__(self, sampler: EpochSampler, samples_per_step: int):
        self.sampler, self.samples_per_step = sampler, samples_per_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epochs of the steps that are done."""
        self.sampler.set_epoch(state.global_step // math.ceil(self.sampler.rows / self.samples_per_step))


class Metrics(TrainerCallback):
    """Adds tokens/s and measurements to the logs, and writes all logs to metrics.jsonl, see `metrics.watch`."""

    def __init__(
        self, trainer: Any, run: StageContext[RunSettings], measure: Callable[[], dict[str, float]] | None
    ) -> None:
        self.trainer, self.measure, self.eval_steps = trainer, measure, run.settings.eval_steps
        self.path = run.work / "metrics.jsonl"
        self.last_log: tuple[float, int] | None = None  # time and tokens
        self.paused = 0.0  # seconds of measurements since then

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines after the checkpoint: a continued run repeats those steps. A copy of the file stays."""
        if self.path.is_file() and is_main():
            records = [r for r in read_metrics(self.path) if r["step"] <= state.global_step and state.global_step]
            number = len(list(self.path.parent.glob("metrics-*.jsonl")))
            shutil.copy(self.path, self.path.with_name(f"metrics-{number}.jsonl"))
            write_atomically(self.path, "".join(map(_json_line, records)))  # a run that is killed here loses no line
        self.last_log = (time.perf_counter(), state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add tokens/s to the log and append it to the file."""
        logs = logs if logs is not None else {}
        now, tokens = time.perf_counter(), state.num_input_tokens_seen
        begin, before = self.last_log or (now, tokens)
        if "loss" in logs and tokens > before:
            logs["tokens_per_s"] = round((tokens - before) / max(1e-9, now - begin - self.paused), 1)
            self.last_log, self.paused = (now, tokens), 0.0
        if is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_json_line({"step": state.global_step, "time": round(time.time(), 3), **logs}))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The time of a measurement is not training time."""
        self.paused += (metrics or {}).get("eval_runtime", 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the intervals and at the last step."""
        last = state.global_step == state.max_steps
        if self.measure is not None and (last or state.global_step % self.eval_steps == 0):
            begin = time.perf_counter()
            numbers = self.measure()
            self.paused += time.perf_counter() - begin
            state.log_history.append({**numbers, "step": state.global_step})
            # Not Trainer.log: trl's would close its averages of the step here.
            self.trainer.callback_handler.on_log(args, state, control, numbers)  # sets should_log to False
        if last:  # also where the intervals do not divide the steps
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"


def _json_line(record: dict[str, Any]) -> str:
    # One line of a metrics.jsonl, with plain numbers; NaN and infinity, which JSON lacks, become null.
    numbers = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in numbers.items()}
    return json.dumps(finite) + "\n"
