"""Stage 3: reinforcement learning (GRPO) on exact grids from stage 2's merge, then merge.

Reads   OUTPUT/Llama-3.2-1B-Final-merged/ (or --base_model) and the task files in --dataset_dir.
Writes  OUTPUT/Llama-3.2-1B-Final-RL-lora/ and -merged/.

On a CUDA box:  python train_grpo.py --dataset_dir dataset
On a laptop:    python train_grpo.py --config demo/demo_grpo.yaml --dataset_dir demo_dataset \
                    --output_dir demo/output

Results that exist are not made again: if -lora is there and -merged is missing, only the merge runs.
"""

from dataclasses import dataclass, replace

from arc.decoding.greedy import longest_reply
from arc.grpo.guard import PolicyGuard
from arc.grpo.prompts import report_prompts
from arc.grpo.rewards import component_weights, reward_functions
from arc.grpo.scan import scan_prompts
from arc.grpo.settings import PolicySettings
from arc.grpo.sharing import check_sharing, samples_from_copy
from arc.grpo.trainer import grpo_trainer
from arc.models.loading import load_model
from arc.models.lora import add_lora
from arc.runs.artifacts import Stage
from arc.runs.settings import parse_settings, user_errors
from arc.training.data import load_data
from arc.training.metrics import watch
from arc.training.run import StageRun, lora_options

STAGE = Stage("Final-RL", parent="Final", script="train_grpo.py", parent_script="base_finetune_final.py")


@dataclass
class Settings(PolicySettings):
    """Settings of the reinforcement learning."""


def main() -> None:
    """Train and merge; each step is skipped if its result exists."""
    settings = parse_settings(Settings)
    run = StageRun(STAGE, settings)
    if run.needs_training():
        with user_errors():
            check_sharing(run)
            data = load_data(run, solved_only=True)
            longest = longest_reply(data.puzzles, data.puzzles.keys, data.tokenizer)
            report_prompts(run, data, longest)
        run.begin(data)
        with run.machine_errors("loading the model"):
            model, _ = load_model(run.parent, run.precision, settings.max_seq_length)
            model = add_lora(model, run.precision, **lora_options(settings))
        with run.machine_errors("scanning the prompts"):  # LoRA adds nothing yet: this is stage 2's model
            # The scan samples complete replies and learns nothing, whatever the training does.
            scan_settings = replace(settings, stop_at_error=False, supervised_weight=0.0)
            from_copy = samples_from_copy(model, scan_settings, run.precision.engine)
            scan = scan_prompts(model, run, data, longest, from_copy)
        with run.machine_errors("loading the model"):
            rewards = reward_functions(data.puzzles, data.tokenizer, data.format, stopped=settings.stop_at_error)
            weights = component_weights(**settings.rewards)[: len(rewards)]
            trainer = grpo_trainer(
                model, run, data, rewards, reward_weights=weights, max_completion_length=longest,
                chosen=scan.chosen if scan else None,
            )  # fmt: skip
            guard = PolicyGuard(model, run, data)
            watch(trainer, run, guard.measure if guard.prompts else None)
            guard.attach(trainer)
        run.train(trainer)
        counts = scan.counts() if scan else None
        run.save(model, data, computed=trainer.computed, scan=counts, **guard.keep_best(trainer))
        del model, trainer, guard
    run.merge()


if __name__ == "__main__":
    main()
