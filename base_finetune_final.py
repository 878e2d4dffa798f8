"""Stage 2: a second LoRA round from stage 1's merge, with the inputs and the first output masked, then merge.

Reads   OUTPUT/Llama-3.2-1B-Base-merged/ (or --base_model) and the task files in --dataset_dir.
Writes  OUTPUT/Llama-3.2-1B-Final-lora/ and -merged/.

On a CUDA box:  python base_finetune_final.py --dataset_dir dataset
On a laptop:    python base_finetune_final.py --config demo/demo.yaml --dataset_dir demo_dataset \
                    --output_dir demo/output

What is there already is not made again: with -lora there and -merged missing, only the merge runs.
"""

from dataclasses import dataclass

from arc.models.collator import InputMaskingDataCollator
from arc.models.loading import load_model
from arc.models.lora import add_lora
from arc.runs.artifacts import Stage
from arc.runs.settings import SupervisedSettings, failed_checks, parse_settings, setting, user_errors
from arc.training.data import load_data
from arc.training.mask_report import report_masks
from arc.training.run import StageRun, lora_options
from arc.training.trainer import heldout_measure, sft_trainer, watch

STAGE = Stage("Final", parent="Base", script="base_finetune_final.py", parent_script="base_finetune.py")


@dataclass
class Settings(SupervisedSettings):
    """The published recipe; what is not decided here stands in run_settings.RunSettings and SupervisedSettings."""

    seed: int = setting(43, "seed of order and augmentation: other views than stage 1's")
    num_train_epochs: float = setting(1.0, "epochs; one holds every base puzzle in each of its 8 symmetries")
    learning_rate: float = setting(1e-4, "highest rate of the LoRA matrices")
    embedding_learning_rate: float = setting(1e-5, "highest rate of embed_tokens and lm_head")
    mask_first_n_examples: int = setting(
        1, "leading outputs that are masked too: a rule cannot be known before its first pair"
    )

    def problems(self) -> list[str]:
        """What is wrong with these settings, one line each."""
        return failed_checks(
            self, {"mask_first_n_examples": (self.mask_first_n_examples >= 0, "a whole number from 0")}
        )


def main() -> None:
    """Train and merge, each unless its result is there."""
    settings = parse_settings(Settings)
    run = StageRun(STAGE, settings)
    if run.needs_training():
        with user_errors():
            data = load_data(run)
            collator = InputMaskingDataCollator(data.tokenizer, mask_first_n_examples=settings.mask_first_n_examples)
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
