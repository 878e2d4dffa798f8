"""Trainers of the stages: order of rows, batches, optimizer, logs; transformers' and trl's own do the training.

The stage scripts decide what is trained on what; run.py runs what is made here. Heavy libraries are imported
inside functions, Unsloth before the libraries that it patches.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from arc.models.collator import InputMaskingDataCollator
from arc.models.packing import can_pack, use_packed_attention
from arc.puzzles.encoding import TrainingSamples
from arc.runs.processes import divide_batch, gather, is_main, process_count, share
from arc.runs.settings import RunSettings, SupervisedSettings
from arc.training.batch_planning import SupervisedTrial, faster_way, let_run_ahead, optimizer_seconds, plan_batches
from arc.training.curves import read_metrics
from arc.training.data import StageData
from arc.training.stage import StageContext

MUON = "muon"  # the one optimizer of --optim that is not transformers'
FOR_THE_REST = "adamw_torch_fused"  # what transformers is told in its place, and what it has for the rest
MANY_SAMPLES = 32  # of a step of one process: from there on other processes make its batches

# ---------------------------------------------------------------------------------------------------------------------
# Trainer


class EpochSampler:
    """Rows of an epoch in a seeded order that depends on (seed, epoch) alone.

    Yields `epoch * rows + index`, so that a row number names its epoch: the views of an epoch are its own, in whatever
    process a row is made. Processes that work together take turns with whole forward passes: where those of an epoch do
    not come out even, a number that stands for nothing to learn (see `FilledSamples`) makes up for it.

    Args:
        rows: of an epoch.
        seed: of the order.
        multiple_of: an epoch is filled up to a multiple of this.
        filler: the number that it is filled up with.
    """

    def __init__(self, rows: int, seed: int, multiple_of: int = 1, filler: int = -1):
        """See the class."""
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.fillers = [filler] * (-rows % multiple_of)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer when an epoch begins."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        """Row numbers of the current epoch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return iter((self.epoch * self.rows + order).tolist() + self.fillers)

    def __len__(self) -> int:
        """Rows of one epoch, and what fills it up."""
        return self.rows + len(self.fillers)


class FilledSamples:
    """Samples, and a row number beyond them that gives a short row of which nothing is learned.

    So all processes have as many forward passes as the others, and no view is seen twice: the loss is a sum over the
    learned tokens of all, to which such a row adds nothing.

    Args:
        samples: rows by number.
        filler: the number, above those of the samples.
    """

    TOKENS = 8

    def __init__(self, samples: TrainingSamples, filler: int):
        """See the class."""
        self.samples, self.filler = samples, filler

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number; "filler" says which of them are none of the samples."""
        made = self.samples.__getitems__([0 if row == self.filler else row for row in rows])
        return [
            {**row, "input_ids": row["input_ids"][: self.TOKENS], "reply_spans": row["reply_spans"][:0], "filler": True}
            if number == self.filler
            else {**row, "filler": False}
            for number, row in zip(rows, made, strict=True)
        ]


def lazy_dataset(rows: Any, count: int) -> Any:
    """A datasets.Dataset of `count` row numbers whose rows are made when read (trl takes no other map-style one)."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"row": list(range(count))})
    # Without what datasets wraps around it: a fingerprint, for which it pickles all puzzles (19 s under a profiler).
    Dataset.set_format.__wrapped__(dataset, "custom", transform=_RowsMade(rows))
    return dataset


class _RowsMade:
    """Row numbers -> rows. A class, which can be pickled: processes that make batches may be no forks of this one."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows, numbers = self.rows, batch["row"]
        made = rows.__getitems__(numbers) if hasattr(rows, "__getitems__") else [rows[number] for number in numbers]
        return {name: [row[name] for row in made] for name in made[0]}


def planned_rows(run: StageContext[RunSettings], data: StageData, rows_per_step: int) -> int:
    """Rows of as many epochs as the training may enter: each epoch has views of its own."""
    rows, settings = len(data.samples), run.settings
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps * rows_per_step / rows
    return rows * (math.ceil(epochs) + 1)  # one more: a trainer counts an epoch's last, short batch as a step


def sft_trainer(
    model: Any, run: StageContext[SupervisedSettings], data: StageData, collator: InputMaskingDataCollator
) -> Any:
    """The trainer of a supervised stage: UnslothTrainer on the Unsloth engine, transformers' Trainer otherwise.

    Both have the same parameter groups (`embedding_learning_rate` for embed_tokens and lm_head), order and views. How a
    step is computed is decided here (see `batch_planning.plan_batches`), printed, and kept as `run.plan`.
    """
    import torch

    settings, precision = run.settings, run.precision
    heldout = data.heldout_rows(settings.max_seq_length)
    measured = settings.eval_steps > 0 and len(heldout) > 0
    padded = copy.copy(collator)  # a measured loss is a mean over batches: they stay as they were
    packed = settings.padding_free if settings.padding_free is not None else can_pack(model, precision.torch_dtype)
    if packed:
        collator.packed_for = precision.engine
        use_packed_attention(model, precision.engine)
    order = list(EpochSampler(len(data.samples), settings.seed))
    trial = SupervisedTrial(model, run, data.samples, collator, order)
    run.plan = plan_batches(trial, steps=data.steps(settings) - run.steps_done(), kept=run.kept_plan())
    run.plan = replace(run.plan, loader_processes=loader_processes(settings, precision.engine))
    arguments = {
        **common_arguments(run),
        "dataloader_num_workers": run.plan.loader_processes,
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "eval_strategy": "steps" if measured else "no",
        "eval_steps": settings.eval_steps if measured else None,
        "include_num_input_tokens_seen": "non_padding",
        "prediction_loss_only": True,
    }
    samples, sampler = data.samples, EpochSampler(len(data.samples), settings.seed)
    if process_count() > 1:
        filler = planned_rows(run, data, settings.samples_per_step)
        together = arguments["per_device_train_batch_size"] * process_count()
        samples = FilledSamples(data.samples, filler)
        sampler = EpochSampler(len(data.samples), settings.seed, multiple_of=together, filler=filler)
    if precision.engine == "transformers":
        from transformers import Trainer, TrainingArguments

        base, arguments = Trainer, TrainingArguments(**arguments)
        arguments.embedding_learning_rate = settings.embedding_learning_rate
        train, evaluation = samples, heldout
    else:
        from unsloth import UnslothTrainer, UnslothTrainingArguments

        base = UnslothTrainer
        arguments = UnslothTrainingArguments(
            embedding_learning_rate=settings.embedding_learning_rate,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=settings.max_seq_length,
            **arguments,
        )
        train = lazy_dataset(samples, planned_rows(run, data, settings.samples_per_step) + 1)
        evaluation = lazy_dataset(heldout, len(heldout))
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process uses one GPU, however many it sees
    cls, options = optimizer_class(model, arguments, settings.optim)
    seconds = optimizer_seconds(model, cls, options, settings.max_grad_norm)
    run.plan = replace(run.plan, seconds_per_step=run.plan.seconds_per_step + seconds)
    print(run.plan.describe(data.steps(settings) - run.steps_done()))
    if torch.cuda.is_available() and settings.engine == "auto":
        faster = faster_way(run.plan, precision, torch.cuda.get_device_properties(0).total_memory)
        if faster:
            print(faster)
    from transformers import TrainerCallback

    class StageTrainer(base):
        """The engine's trainer with this pipeline's order and learning rates, and with fewer waits for the device."""

        tokens_on_device: Any = 0
        operations_per_token: int | None = None

        def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            # Few batches, and processes that make them would fall to a signal before the main one could save.
            trained, self.data_collator = self.data_collator, padded
            workers, self.args.dataloader_num_workers = self.args.dataloader_num_workers, 0
            try:
                return super().get_eval_dataloader(*args, **kwargs)
            finally:
                self.data_collator, self.args.dataloader_num_workers = trained, workers

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochSampler:
            return sampler

        def create_optimizer(self, model: Any = None) -> Any:
            if precision.engine == "unsloth" and settings.optim != MUON:  # its own has the same two groups
                super().create_optimizer() if model is None else super().create_optimizer(model)
            elif self.optimizer is None:
                self.optimizer = optimizer_with_embedding_rate(self.model, self.args, settings.optim)
            let_run_ahead(self.optimizer)
            return self.optimizer

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            if self.operations_per_token is None:  # counted once: it takes milliseconds
                self.operations_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
            return self.operations_per_token * inputs["input_ids"].numel()

        def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
            mask = inputs.get("attention_mask")
            real = inputs["input_ids"] != data.tokenizer.pad_token_id if mask is None else mask
            self.tokens_on_device += real.sum()

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            # The device is asked for the count where it is waited for anyway, not in every pass.
            if self.control.should_log or self.control.should_save or self.control.should_evaluate:
                count = torch.as_tensor(self.tokens_on_device, device=self.args.device, dtype=torch.int64)
                self.state.num_input_tokens_seen += self.accelerator.gather(count).sum().item()
                self.tokens_on_device = 0
            super()._maybe_log_save_evaluate(*args, **kwargs)

    class Continued(TrainerCallback):
        """Tells the order its epoch: the trainer's own word gets lost where several processes skip what was trained."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sampler.set_epoch(state.global_step // math.ceil(sampler.rows / settings.samples_per_step))

    return StageTrainer(
        callbacks=[Continued(), kept_in_checkpoints(run)],
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation if measured else None,
        data_collator=collator,
        processing_class=data.tokenizer,
    )


def kept_in_checkpoints(run: StageContext[RunSettings]) -> Any:
    """A callback that keeps how a step is computed in the checkpoints, see training_tools.StageRun.kept_plan."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Plan(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": run.plan.choice() if run.plan is not None else {}}

    return Plan()


def optimizer_class(model: Any, arguments: Any, optim: str | None = None) -> tuple[type, dict[str, Any]]:
    """Class and options of an optimizer, see `optimizer_with_embedding_rate`."""
    from transformers import Trainer

    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if optim == MUON:
        from arc.training.muon import Muon

        cls = Muon  # with AdamW's options
    return cls, options


def optimizer_with_embedding_rate(model: Any, arguments: Any, optim: str | None = None) -> Any:
    """An optimizer with Unsloth's two groups: fully trained embeddings at their own rate, LoRA at the main one.

    Args:
        model: a peft model.
        arguments: of a trainer, with `embedding_learning_rate`.
        optim: "muon": LoRA's matrices are stepped by it; else the optimizer is the arguments' one.
    """
    cls, options = optimizer_class(model, arguments, optim)
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".modules_to_save." in name].append(parameter)
    rates = {False: arguments.learning_rate, True: arguments.embedding_learning_rate}
    optimizer = cls(
        [
            {"params": parameters, "lr": rates[embedding], "weight_decay": arguments.weight_decay}
            | ({"use_muon": not embedding} if optim == MUON else {})
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


def common_arguments(run: StageContext[RunSettings]) -> dict[str, Any]:
    """Arguments that every trainer of the pipeline gets, in transformers' names."""
    import torch

    settings, precision, plan = run.settings, run.precision, run.plan
    size, accumulation = divide_step(settings)
    checkpointing = settings.gradient_checkpointing is not False
    if plan is not None:
        size, accumulation, checkpointing = plan.micro_batch_size, plan.passes, plan.gradient_checkpointing
    arguments = {
        "output_dir": str(run.work),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # transformers 5 reads a number below 1 as a share of all steps
        "optim": FOR_THE_REST if settings.optim == MUON else settings.optim,
        "adam_beta2": settings.adam_beta2,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "use_cpu": not torch.cuda.is_available(),
        "seed": settings.seed,
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "gradient_checkpointing": checkpointing,
        # By the clock unless a number of steps is given, and at the last step; run_guards.guard keeps the newest.
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "remove_unused_columns": False,  # the collator reads reply_spans and key, the reward reads key
        "dataloader_num_workers": settings.dataloader_num_workers or 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # else each batch waits for the last step
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "run_name": run.lora.name,  # what W&B and others call the run
        "report_to": [] if settings.report_to == "none" else settings.report_to.split(","),
    }
    if process_count() > 1:
        arguments["ddp_find_unused_parameters"] = False  # every step uses all of them
    if precision.engine == "transformers" or process_count() > 1:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def loader_processes(settings: Any, engine: str) -> int:
    """Processes that make batches ahead: as the settings say, else some where the main one would keep a GPU waiting.

    64 samples take it 4.4 ms on one core without other work: as long as a small model's forward pass is started ahead.

    Args:
        settings: of stage 1 or 2.
        engine: "transformers" or "unsloth", whose rows processes have not been tried on.
    """
    import torch

    if settings.dataloader_num_workers is not None:
        return settings.dataloader_num_workers
    many = settings.samples_per_step // process_count() >= MANY_SAMPLES
    return 2 if many and engine == "transformers" and torch.cuda.is_available() else 0


def divide_step(settings: Any) -> tuple[int, int]:
    """Samples of a forward pass and forward passes of a step, of each process, where nothing is tried.

    Raises:
        ValueError: a step's samples cannot be divided so.
    """
    size, passes = divide_batch(settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    own, micro = size * passes, settings.micro_batch_size
    if micro is None:
        return size, passes
    if own % micro:
        raise ValueError(f"--micro_batch_size {micro} does not divide the {own} samples of each process's step")
    return micro, own // micro


def check_arguments(run: StageContext[RunSettings]) -> None:
    """Let transformers check what it knows best (schedules, optimizers, reporters), before a model is loaded.

    Raises:
        ValueError: a value that no trainer would take.
    """
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    divide_step(run.settings)
    if run.settings.compile_layers and run.precision.engine == "unsloth":
        raise ValueError("--compile_layers is for --engine transformers: Unsloth has compiled parts of its own")
    if run.settings.fold_lora:
        if run.precision.engine == "unsloth" or run.precision.load_in_4bit:
            raise ValueError("--fold_lora is for --engine transformers and weights that are not in 4 bits")
        if run.settings.lora_dropout:
            raise ValueError("--fold_lora true: not beside --lora_dropout, which is of activations")
    for name, known, usual in (
        ("optim", OptimizerNames, ["adamw_8bit", "adamw_torch"]),
        ("lr_scheduler_type", SchedulerType, ["cosine", "linear"]),
    ):
        value, names = getattr(run.settings, name), [str(member.value) for member in known]
        if value not in names and (name, value) != ("optim", MUON):
            more = f", or {MUON}" if name == "optim" else ""
            near = ", ".join(difflib.get_close_matches(value, names) or usual)
            raise ValueError(f"--{name} {value}: expected a name that transformers knows, such as {near}{more}")
    try:
        arguments = TrainingArguments(**common_arguments(run))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # says if its package is missing
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"--report_to {run.settings.report_to}: {str(error).splitlines()[0][:300]}") from None


def watch(trainer: Any, run: StageContext[RunSettings], measure: Callable[[], dict[str, float]] | None) -> None:
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
            if self.path.is_file() and is_main():
                # A continued run repeats the steps after its checkpoint: their lines are written anew.
                kept = [r for r in read_metrics(self.path) if r["step"] <= state.global_step and state.global_step]
                number = len(list(run.work.glob("metrics-*.jsonl")))
                shutil.copy(self.path, run.work / f"metrics-{number}.jsonl")
                beside = run.work / "metrics.tmp"  # a run that is killed here loses no line
                beside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
                beside.replace(self.path)
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
            if not is_main():
                return
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


def heldout_measure(
    model: Any, run: StageContext[RunSettings], data: StageData
) -> Callable[[], dict[str, float]] | None:
    """A function that decodes held-out puzzles greedily and returns the share solved; None if there are none."""
    from arc.decoding.greedy import exact_match

    settings = run.settings
    prompts = data.prompts(settings.eval_puzzles, settings.max_seq_length) if settings.eval_puzzles else []
    if not prompts or not settings.eval_steps:
        return None
    size, own = settings.per_device_eval_batch_size, share(prompts)

    def measure() -> dict[str, float]:
        if len(own) == len(prompts):
            return exact_match(model, run.precision.engine, data.tokenizer, data.heldout, own, batch_size=size)
        numbers = {}
        if own:
            numbers = exact_match(model, run.precision.engine, data.tokenizer, data.heldout, own, batch_size=size)
        parts = gather((len(own), numbers))
        names = parts[0][1]  # the main process always has a part
        return {n: sum(count * part[n] for count, part in parts if count) / len(prompts) for n in names}

    return measure
