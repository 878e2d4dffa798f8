"""Stage 1: LoRA on the whole text of augmented puzzles, then merge.

Reads   --base_model (16-bit) and the task files in --dataset_dir.
Writes  OUTPUT/Llama-3.2-1B-prepared/ (vocabulary cut to one token per cell),
        OUTPUT/Llama-3.2-1B-Base-lora/ and -merged/.

On a CUDA box:  python base_finetune.py --dataset_dir dataset
On a laptop:    python base_finetune.py --config demo/demo.yaml --base_model demo/base --dataset_dir demo_dataset \
                    --output_dir demo/output

What is there already is not made again: with -lora there and -merged missing, only the merge runs.
"""

from dataclasses import dataclass

from arc.models.collator import InputMaskingDataCollator
from arc.models.loading import load_model
from arc.models.lora import add_lora
from arc.runs.artifacts import Stage
from arc.runs.settings import SupervisedSettings, parse_settings, setting, user_errors
from arc.training.data import load_data
from arc.training.mask_report import report_masks
from arc.training.run import StageRun, lora_options
from arc.training.trainer import heldout_measure, sft_trainer, watch

STAGE = Stage("Base", parent="prepared", script="base_finetune.py", parent_script="base_finetune.py")


@dataclass
class Settings(SupervisedSettings):
    """The published recipe; what is not decided here stands in run_settings.RunSettings and SupervisedSettings."""

    base_model: str | None = setting("meta-llama/Llama-3.2-1B-Instruct", "folder or hub name of the 16-bit base model")
    num_train_epochs: float = setting(1.0, "epochs; one holds every base puzzle in each of its 8 symmetries")
    learning_rate: float = setting(1e-4, "highest rate of the LoRA matrices")
    embedding_learning_rate: float = setting(1e-5, "highest rate of embed_tokens and lm_head")


def main() -> None:
    """Train and merge, each unless its result is there."""
    settings = parse_settings(Settings)
    run = StageRun(STAGE, settings)
    if run.needs_training():
        with user_errors():
            data = load_data(run)
            # The whole text is learned: what puzzles look like as well as how they are solved.
            collator = InputMaskingDataCollator(data.tokenizer, mask_inputs=False)
            report_masks(run, data, collator)
        run.begin(data)
        with run.machine_errors("loading the model"):
            model, _ = load_model(run.parent, run.precision, settings.max_seq_length)
            model = add_lora(model, run.precision, **lora_options(settings))
        with run.machine_errors("training"):
            trainer = sft_trainer(model, run, data, collator)
            watch(trainer, run, heldout_measure(model, run, data))
        run.train(trainer, data)
        run.save(model, data)
        del model, trainer
    run.merge()


if __name__ == "__main__":
    main()
