"""What is decided about a run of a stage: settings, precision, folders, the starting model, the batch plan.

Data, trainers and batch planning take a `StageContext`; `run.StageRun` acts on it (train, save, merge).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from arc.models.loading import Precision, resolve_precision
from arc.runs.artifacts import Stage
from arc.runs.checkpoints import complete_checkpoints
from arc.runs.needs import format_duration
from arc.runs.processes import process_count
from arc.runs.settings import RunSettings

S = TypeVar("S", bound=RunSettings, covariant=True)  # settings of a stage


@dataclass(frozen=True)
class BatchPlan:
    """How a step is computed."""

    micro_batch_size: int  # samples of a forward pass, in each process
    passes: int  # forward passes of a step, in each process
    gradient_checkpointing: bool
    padding_free: bool  # the samples of a pass stand in one row, see models/packing.py
    compile_layers: bool = False
    peak_bytes: int | None = None  # GPU memory of the longest pass and of what training adds to it; None: not tried
    seconds_per_step: float | None = None  # of all passes and the optimizer; None: not timed
    loader_processes: int = 0  # that make batches ahead; 0: the main process makes them

    def choice(self) -> dict[str, Any]:
        """The plan without its measurements, for checkpoints and manifests: a rerun writes the same."""
        measured = ("peak_bytes", "seconds_per_step")
        return {name: value for name, value in asdict(self).items() if name not in measured}

    def describe(self, steps: int, rows: str = "samples") -> str:
        """One line: the plan, and the estimated time of `steps` steps; `rows` is the plural name of a batch's rows."""
        size = self.micro_batch_size
        words = [
            f"a step: {self.passes} forward {'passes' if self.passes > 1 else 'pass'} of {size} "
            f"{rows if size > 1 else rows[:-1]}",
            "without padding" if self.padding_free else "padded",
            f"{'with' if self.gradient_checkpointing else 'without'} gradient checkpointing",
        ]
        if self.compile_layers:
            words.append("layers compiled")
        if self.loader_processes:
            words.append(f"batches made by {self.loader_processes} more processes")
        if process_count() > 1:
            words.append(f"in each of {process_count()} processes")
        text = ", ".join(words)
        if self.peak_bytes is not None:
            text += f"; at most {self.peak_bytes / 2**30:.1f} GiB of GPU memory"
        if self.seconds_per_step is not None:
            time = format_duration(self.seconds(steps))
            text += f"; {self.seconds_per_step:.3g} s a step, estimated time of {steps:,} steps: {time}"
        return text

    def seconds(self, steps: int) -> float:
        """Seconds of `steps` steps, of a plan that was timed."""
        assert self.seconds_per_step is not None
        return self.seconds_per_step * steps


class StageContext(Generic[S]):
    """What is decided about one run of a stage. `work` is the folder of checkpoints and logs."""

    def __init__(self, stage: Stage, settings: S):
        self.stage, self.settings = stage, settings
        self.precision: Precision = resolve_precision(settings.engine, settings.dtype, settings.load_in_4bit)
        self.lora, self.merged, self.work = stage.lora(settings), stage.merged(settings), stage.checkpoints(settings)
        self.starts_from: Path | str | None = None  # the model to train; None if the adapter exists already
        self.to_prepare: Path | None = None  # folder of the prepared base, if it has to be made first
        self.to_move: list[Path] = []  # folders to move aside before anything is written (--overwrite)
        self.made_from: dict[str, str] = {}  # name and fingerprint of the parent at the start of the training
        self.plan: BatchPlan | None = None  # how a step is computed; None until a trainer has decided

    def needs_training(self) -> bool:
        """Whether the adapter does not exist yet."""
        return self.starts_from is not None

    @property
    def parent(self) -> Path | str:
        """The model that training starts from: a folder or a hub name. Only where `needs_training()`."""
        if self.starts_from is None:
            raise RuntimeError(f"{self.lora} is trained already: no model to start from was looked for")
        return self.starts_from

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(iter(complete_checkpoints(self.work)), None)

    def last_state(self) -> dict[str, Any]:
        """The trainer's state in the newest checkpoint; empty if there is none."""
        checkpoints = complete_checkpoints(self.work, quiet=True)
        return json.loads((checkpoints[0] / "trainer_state.json").read_text(encoding="utf-8")) if checkpoints else {}

    def steps_done(self) -> int:
        """Optimizer steps of the newest checkpoint, from which the training continues."""
        return self.last_state().get("global_step", 0)

    def kept_plan(self) -> BatchPlan | None:
        """The batch plan of the newest checkpoint; None if that is not known."""
        choice = self.last_state().get("stateful_callbacks", {}).get("Plan", {}).get("attributes")
        try:
            return BatchPlan(**choice) if choice else None
        except TypeError:  # another version's
            return None
