"""A supervised stage from beginning to end. Stages 1 and 2 differ in their settings and in what they mask."""

from __future__ import annotations

from arc.models.collator import InputMaskingDataCollator
from arc.models.loading import load_model
from arc.models.lora import add_lora
from arc.runs.artifacts import Stage
from arc.runs.settings import SupervisedSettings, user_errors
from arc.training.data import load_data
from arc.training.mask_report import report_masks
from arc.training.metrics import heldout_measure, watch
from arc.training.run import StageRun, lora_options
from arc.training.trainer import sft_trainer


def run_supervised_stage(
    stage: Stage, settings: SupervisedSettings, *, mask_inputs: bool, mask_first_n_examples: int = 0
) -> None:
    """Train and merge, each unless its result exists; the masks are those of `InputMaskingDataCollator`."""
    run = StageRun(stage, settings)
    if run.needs_training():
        with user_errors():
            data = load_data(run)
            collator = InputMaskingDataCollator(
                data.tokenizer, mask_inputs=mask_inputs, mask_first_n_examples=mask_first_n_examples
            )
            report_masks(run, data, collator)
        run.begin(data)
        with run.machine_errors("loading the model"):
            model, _ = load_model(run.parent, run.precision, settings.max_seq_length)
            model = add_lora(model, run.precision, **lora_options(settings))
        with run.machine_errors("training"):
            trainer = sft_trainer(model, run, data, collator)
            watch(trainer, run, heldout_measure(model, run, data))
        run.train(trainer)
        run.save(model, data)
        del model, trainer  # their memory is the merge's
    run.merge()
