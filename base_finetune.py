"""Stage 1: LoRA on the whole text of augmented puzzles, then merge.

Reads   --base_model (16-bit) and the task files in --dataset_dir.
Writes  OUTPUT/Llama-3.2-1B-prepared/ (vocabulary cut to one token per cell),
        OUTPUT/Llama-3.2-1B-Base-lora/ and -merged/.

On a CUDA box:  python base_finetune.py --dataset_dir dataset
On a laptop:    python base_finetune.py --config demo/demo.yaml --base_model demo/base --dataset_dir demo_dataset \
                    --output_dir demo/output

What exists is not made again: if -lora exists and -merged does not, only the merge runs.
"""

from dataclasses import dataclass

from arc.runs.artifacts import Stage
from arc.runs.settings import SupervisedSettings, parse_settings, setting
from arc.training.supervised import run_supervised_stage

STAGE = Stage("Base", parent="prepared", script="base_finetune.py", parent_script="base_finetune.py")


@dataclass
class Settings(SupervisedSettings):
    """The published recipe; arc/runs/settings.py has the other settings."""

    base_model: str | None = setting("meta-llama/Llama-3.2-1B-Instruct", "folder or hub name of the 16-bit base model")
    num_train_epochs: float = setting(1.0, "epochs; one holds every base puzzle in each of its 8 symmetries")
    learning_rate: float = setting(1e-4, "highest rate of the LoRA matrices")
    embedding_learning_rate: float = setting(1e-5, "highest rate of embed_tokens and lm_head")


def main() -> None:
    """Train and merge, each unless its result exists. The whole text is learned: inputs as well as outputs."""
    run_supervised_stage(STAGE, parse_settings(Settings), mask_inputs=False)


if __name__ == "__main__":
    main()
