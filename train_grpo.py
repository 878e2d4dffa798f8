"""Stage 3: reinforcement learning (GRPO) on exact grids from stage 2's merge, then merge.

Reads   OUTPUT/Llama-3.2-1B-Final-merged/ (or --base_model) and the task files in --dataset_dir.
Writes  OUTPUT/Llama-3.2-1B-Final-RL-lora/ and -merged/.

On a CUDA box:  python train_grpo.py --dataset_dir dataset
On a laptop:    python train_grpo.py --config demo/demo_grpo.yaml --dataset_dir demo_dataset \
                    --output_dir demo/output

What is there already is not made again: with -lora there and -merged missing, only the merge runs.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from arc_loader import ArcDataset
from artifact_tools import Stage
from inference_tools import longest_reply
from model_tools import LINEAR_MODULES, add_lora, load_model
from run_settings import RunSettings, failed_checks, parse_settings, setting, user_errors
from training_tools import (
    StageRun,
    grpo_trainer,
    heldout_measure,
    load_data,
    lora_options,
    report_prompts,
    reward_functions,
    watch,
)

STAGE = Stage("Final-RL", parent="Final", script="train_grpo.py", parent_script="base_finetune_final.py")


@dataclass
class Settings(RunSettings):
    """Settings of the reinforcement learning; what is not decided here stands in run_settings.RunSettings."""

    seed: int = setting(44, "seed of order, augmentation and sampling: other views than the earlier stages'")
    # The embeddings stay as stage 2 left them: a few hundred policy steps have nothing new to say about 79 tokens.
    target_modules: list[str] = setting(LINEAR_MODULES, "layers that LoRA is added to")
    num_generations: int = setting(8, "completions sampled for each prompt: a group")
    per_device_train_batch_size: int = setting(16, "completions of one forward pass")
    gradient_accumulation_steps: int = setting(2, "forward passes of one step")
    max_steps: int = setting(250, "optimizer steps")
    learning_rate: float = setting(5e-6, "highest rate of the LoRA matrices")
    warmup_ratio: float = setting(0.05, "share of the steps in which the rate rises")
    temperature: float = setting(1.0, "of the sampling")
    fast_rollouts: bool = setting(
        False, "sample from a plain copy of the model in training: faster, with the memory of a second 16-bit model"
    )
    beta: float = setting(0.0, "weight of the KL divergence to the start; 0: none, and no reference pass")
    epsilon: float = setting(0.2, "the policy ratio is clipped below 1 - epsilon")
    epsilon_high: float = setting(0.28, "and above 1 + epsilon_high (DAPO's higher upper bound)")
    loss_type: str = setting("dapo", "how trl weighs tokens: dapo, grpo, dr_grpo, bnpo")
    logging_steps: int = setting(1, "steps between log lines")
    eval_steps: int = setting(50, "steps between measurements on the held-out puzzles; 0: never")
    reward_exact: float = setting(1.0, "reward of the exact grid")
    reward_cells: float = setting(0.1, "reward of a wrong grid of the right shape, times its share of right cells")

    def problems(self) -> list[str]:
        """What is wrong with these settings, one line each."""
        group, step = self.num_generations, self.per_device_train_batch_size * self.gradient_accumulation_steps
        pays_most = 0 <= self.reward_cells < self.reward_exact < float("inf")
        losses = ("dapo", "grpo", "dr_grpo", "bnpo")
        checks = {
            "num_generations": (group >= 2 and step % group == 0, f"2 or more that divide the {step} of a step"),
            "max_steps": (self.max_steps >= 1, "a whole number from 1"),
            "temperature": (0 < self.temperature < float("inf"), "a number above 0"),
            "beta": (0 <= self.beta < float("inf"), "a number from 0"),
            "epsilon": (0 < self.epsilon < 1, "a share above 0 and below 1"),
            "epsilon_high": (0 < self.epsilon_high < float("inf"), "a number above 0"),
            "loss_type": (self.loss_type in losses, " or ".join(losses)),
            "reward_cells": (pays_most, "from 0 to below reward_exact: nothing pays more than the exact grid"),
        }
        return failed_checks(self, checks)


class Verdict(NamedTuple):
    """What a reply earns, and whether it is exactly right."""

    reward: float
    exact: bool


def judge_reply(
    dataset: ArcDataset,
    key: str,
    reply: str,
    *,
    reply_end: str,
    lines_sep: str = "\n",
    reward_exact: float = 1.0,
    reward_cells: float = 0.1,
) -> Verdict:
    """Reward of one reply: most for the exact grid, a little for cells of a right-shaped one, else nothing.

    Args:
        dataset: holds the solution.
        key: the view that was asked for; the reply is mapped back through its transforms.
        reply: the whole reply as text, its end token included. What does not decode strictly earns nothing.
        reply_end: what a reply must end with: one without it was cut off and earns nothing.
        lines_sep: between rows.
        reward_exact, reward_cells: for the exact grid; for a wrong one of the right shape, times its right share.
    """
    grid, correct, _ = dataset.decode(reply, lines_sep, key=key, reply_end=reply_end)
    if grid is None or correct is None:
        return Verdict(0.0, False)
    if correct:
        return Verdict(reward_exact, True)
    base_key, reply_number = dataset.get_base_key_and_reply_num(key)
    solution = dataset.solutions[base_key][reply_number]
    share = float((grid == solution).mean()) if grid.shape == solution.shape else 0.0
    return Verdict(reward_cells * share, False)


def main() -> None:
    """Train and merge, each unless its result is there."""
    settings = parse_settings(Settings)
    run = StageRun(STAGE, settings)
    if run.needs_training():
        with user_errors():
            data = load_data(run, solved_only=True)
            longest = longest_reply(data.split.train, data.split.train.keys, data.tokenizer)
            report_prompts(run, data, longest)
        run.begin(data)
        with run.machine_errors("loading the model"):
            model, _ = load_model(run.parent, run.precision, settings.max_seq_length)
            model = add_lora(model, run.precision, **lora_options(settings))
            weights = {"reward_exact": settings.reward_exact, "reward_cells": settings.reward_cells}
            judge = functools.partial(judge_reply, data.split.train, reply_end=data.format["reply_end"], **weights)
            rewards = reward_functions(judge, data.tokenizer)
            trainer = grpo_trainer(model, run, data, rewards, reward_weights=[1.0, 0.0], max_completion_length=longest)
            watch(trainer, run, heldout_measure(model, run, data))
        run.train(trainer, data)
        run.save(model, data)
        del model, trainer
    run.merge()


if __name__ == "__main__":
    main()
