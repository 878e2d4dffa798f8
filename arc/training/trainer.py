"""The trainer of a supervised stage: transformers' or Unsloth's, with this pipeline's order, optimizer and logs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from arc.models.collator import InputMaskingDataCollator
from arc.models.library_patches import let_run_ahead, use_one_gpu
from arc.models.packing import can_pack, use_packed_attention
from arc.runs.processes import process_count
from arc.runs.settings import SupervisedSettings
from arc.training.arguments import common_arguments, loader_processes
from arc.training.batch_planning import faster_way, plan_batches
from arc.training.data import StageData
from arc.training.optimizers import MUON, optimizer_class, optimizer_seconds, optimizer_with_embedding_rate
from arc.training.rows import EpochSampler, FilledSamples, lazy_dataset, planned_rows
from arc.training.stage import BatchPlan, StageContext
from arc.training.trials import SupervisedTrial

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the engine's trainer follows it, see sft_trainer; transformers is slow to load


class SupervisedTrainer(Trainer):
    """What this pipeline changes in an engine's trainer: order, learning rates, and fewer waits for the device.

    `padded` is the collator of measurements; `options` are those of the engine's trainer.
    """

    data_collator: Any
    optimizer: Any

    def __init__(
        self, run: StageContext[SupervisedSettings], sampler: EpochSampler, padded: InputMaskingDataCollator,
        **options: Any,
    ):  # fmt: skip
        self.run, self.sampler, self.padded = run, sampler, padded
        self.tokens_on_device: Any = 0  # counted, but not asked for yet
        self.operations_per_token: int | None = None
        super().__init__(**options)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the engine's, with padding, and in this process: a signal would end others before this one could save."""
        trained, self.data_collator = self.data_collator, self.padded
        workers, self.args.dataloader_num_workers = self.args.dataloader_num_workers, 0
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_num_workers = trained, workers

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochSampler:
        return self.sampler

    def create_optimizer(self, model: Any = None) -> Any:
        """An optimizer with a learning rate for the embeddings, which does not wait for the device."""
        settings = self.run.settings
        if self.run.precision.engine == "unsloth" and settings.optim != MUON:  # Unsloth's has the same two groups
            super().create_optimizer() if model is None else super().create_optimizer(model)
        elif self.optimizer is None:
            self.optimizer = optimizer_with_embedding_rate(self.model, self.args, settings.optim)
        let_run_ahead(self.optimizer)
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers', which counts the parameters in every pass: milliseconds."""
        if self.operations_per_token is None:
            self.operations_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        return self.operations_per_token * inputs["input_ids"].numel()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        real = inputs["input_ids"] != self.processing_class.pad_token_id if mask is None else mask
        self.tokens_on_device += real.sum()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The device is asked for the count where it is waited for anyway, not in every pass.
        import torch

        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            count = torch.as_tensor(self.tokens_on_device, device=self.args.device, dtype=torch.int64)
            self.state.num_input_tokens_seen += self.accelerator.gather(count).sum().item()
            self.tokens_on_device = 0
        super()._maybe_log_save_evaluate(*args, **kwargs)


def sft_trainer(
    model: Any, run: StageContext[SupervisedSettings], data: StageData, collator: InputMaskingDataCollator
) -> Any:
    """The trainer of a supervised stage: UnslothTrainer on the Unsloth engine, transformers' Trainer otherwise.

    Both have the same parameter groups (`embedding_learning_rate` for embed_tokens and lm_head), order and views. How a
    step is computed is decided here (see `batch_planning.plan_batches`), printed, and set as `run.plan`. From here on
    the collator packs rows where the device can.
    """
    import torch

    from arc.training.callbacks import ContinuedEpoch, Plan

    settings, precision = run.settings, run.precision
    heldout: Any = data.heldout_rows(settings.max_seq_length)
    measured = settings.eval_steps > 0 and len(heldout) > 0
    padded = copy.copy(collator)  # a measured loss is a mean over batches: packing would change it
    plan = run.plan = _plan_step(model, run, data, collator)
    base, arguments = _engine_trainer(run, measured)
    seconds = optimizer_seconds(model, *optimizer_class(model, arguments, settings.optim), settings.max_grad_norm)
    plan = run.plan = replace(plan, seconds_per_step=plan.seconds(1) + seconds)
    print(plan.describe(data.steps(settings) - run.steps_done()))
    if torch.cuda.is_available() and settings.engine == "auto":
        faster = faster_way(plan, precision, torch.cuda.get_device_properties(0).total_memory)
        if faster:
            print(faster)
    samples: Any = data.samples
    sampler = EpochSampler(len(samples), settings.seed)
    filler = planned_rows(run, data, settings.samples_per_step)
    if process_count() > 1:
        multiple = plan.micro_batch_size * process_count()
        sampler = EpochSampler(len(samples), settings.seed, multiple_of=multiple, filler=filler)
        samples = FilledSamples(samples, filler)
    if precision.engine == "unsloth":
        samples, heldout = lazy_dataset(samples, filler + 1), lazy_dataset(heldout, len(heldout))
    return type("StageTrainer", (SupervisedTrainer, base), {})(
        run,
        sampler,
        padded,
        callbacks=[ContinuedEpoch(sampler, settings.samples_per_step), Plan(run)],
        model=model,
        args=arguments,
        train_dataset=samples,
        eval_dataset=heldout if measured else None,
        data_collator=collator,
        processing_class=data.tokenizer,
    )


def _plan_step(
    model: Any, run: StageContext[SupervisedSettings], data: StageData, collator: InputMaskingDataCollator
) -> BatchPlan:
    # Packs rows where the device can, and tries passes of the model.
    settings, precision = run.settings, run.precision
    packed = settings.padding_free if settings.padding_free is not None else can_pack(model, precision.torch_dtype)
    if packed:
        collator.packed_for = precision.engine
        use_packed_attention(model, precision.engine)
    order = list(EpochSampler(len(data.samples), settings.seed))
    trial = SupervisedTrial(model, run, data.samples, collator, order)
    plan = plan_batches(trial, steps=data.steps(settings) - run.steps_done(), earlier=run.kept_plan())
    return replace(plan, loader_processes=loader_processes(settings, precision.engine))


def _engine_trainer(run: StageContext[SupervisedSettings], measured: bool) -> tuple[type, Any]:
    # The engine's class, and its arguments.
    settings = run.settings
    options: dict[str, Any] = {
        **common_arguments(run),
        "dataloader_num_workers": run.plan.loader_processes if run.plan is not None else 0,
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "eval_strategy": "steps" if measured else "no",
        "eval_steps": settings.eval_steps if measured else None,
        "include_num_input_tokens_seen": "non_padding",
        "prediction_loss_only": True,
    }
    if run.precision.engine == "transformers":
        from transformers import Trainer as Base
        from transformers import TrainingArguments

        arguments: Any = TrainingArguments(**options)
        arguments.embedding_learning_rate = settings.embedding_learning_rate
    else:
        from unsloth import UnslothTrainer as Base
        from unsloth import UnslothTrainingArguments

        arguments = UnslothTrainingArguments(
            embedding_learning_rate=settings.embedding_learning_rate,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=settings.max_seq_length,
            **options,
        )
    use_one_gpu(arguments)
    return Base, arguments
