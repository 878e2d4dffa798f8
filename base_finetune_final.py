"""Stage 2: a second LoRA round from stage 1's merge, with the inputs and the first output masked, then merge.

Reads   OUTPUT/Llama-3.2-1B-Base-merged/ (or --base_model) and the task files in --dataset_dir.
Writes  OUTPUT/Llama-3.2-1B-Final-lora/ and -merged/.

On a CUDA box:  python base_finetune_final.py --dataset_dir dataset
On a laptop:    python base_finetune_final.py --config demo/demo.yaml --dataset_dir demo_dataset \
                    --output_dir demo/output

What exists is not made again: if -lora exists and -merged does not, only the merge runs.
"""

from dataclasses import dataclass

from arc.runs.artifacts import Stage
from arc.runs.settings import SupervisedSettings, failed_checks, parse_settings, setting
from arc.training.supervised import run_supervised_stage

STAGE = Stage("Final", parent="Base", script="base_finetune_final.py", parent_script="base_finetune.py")


@dataclass
class Settings(SupervisedSettings):
    """The published recipe; arc/runs/settings.py has the other settings."""

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
    """Train and merge, each unless its result exists. Only outputs are learned, without the first of each puzzle."""
    settings = parse_settings(Settings)
    run_supervised_stage(STAGE, settings, mask_inputs=True, mask_first_n_examples=settings.mask_first_n_examples)


if __name__ == "__main__":
    main()
