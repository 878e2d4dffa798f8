"""The settings of stage 3 (train_grpo.py), and which of them exclude each other."""

from dataclasses import dataclass

from arc.models.lora import LINEAR_MODULES
from arc.runs.settings import WHOLE_FROM_1, RunSettings, failed_checks, setting
from arc.training.stage import StageContext


@dataclass
class PolicySettings(RunSettings):
    """Settings of the reinforcement learning. `RunSettings` has those that all stages share."""

    seed: int = setting(44, "seed of order, augmentation and sampling; other than the earlier stages', for other views")
    # The embeddings stay as stage 2 left them: a few hundred policy steps teach nothing new about 79 tokens.
    target_modules: list[str] = setting(LINEAR_MODULES, "layers that LoRA is added to")
    num_generations: int = setting(8, "completions sampled for each prompt (a group)")
    per_device_train_batch_size: int = setting(16, "times gradient_accumulation_steps: completions of one step")
    gradient_accumulation_steps: int = setting(2, "see per_device_train_batch_size; --micro_batch_size divides a step")
    micro_batch_size: int | None = setting(
        None, "completions of a pass; default: with shared_prompts what fits the GPU, else per_device_train_batch_size"
    )
    gradient_checkpointing: bool | None = setting(
        None, "recompute activations; default: with shared_prompts only where the GPU's memory needs it, else always"
    )
    max_steps: int = setting(250, "optimizer steps")
    learning_rate: float = setting(5e-6, "highest rate of the LoRA matrices")
    warmup_ratio: float = setting(0.05, "share of the steps in which the rate rises")
    temperature: float = setting(1.0, "sampling temperature")
    fast_rollouts: bool | None = setting(
        None,
        "sample from a plain 16-bit copy of the model, which is faster and takes its memory; default: on a GPU with at "
        "least six times that memory",
    )
    shared_prompts: bool | None = setting(
        None,
        "compute a prompt once for all completions of its group in the update; default: in 16 bits on a GPU of compute "
        "capability 8.0 or higher, on the Unsloth engine only with fast_rollouts",
    )
    stop_at_error: bool = setting(
        False,
        "completions end with their first wrong token, so that one forward pass samples all of them; only with rewards "
        "of the exact grid alone (reward_cells 0) and with shared_prompts",
    )
    compile_layers: bool | None = setting(
        False, "compile the layers, which takes a minute (engine transformers); default: no, also for long trainings"
    )
    supervised_weight: float = setting(
        0.0, "weight of stage 2's loss on an additional batch in each step (PPO-ptx); 0: no such batch"
    )
    supervised_batch_size: int = setting(8, "samples of the additional batch, see supervised_weight")
    beta: float = setting(0.0, "weight of the KL divergence to the start; 0: none, which saves a forward pass")
    epsilon: float = setting(0.2, "the policy ratio is clipped below 1 - epsilon")
    epsilon_high: float = setting(
        0.28, "the policy ratio is clipped above 1 + epsilon_high (higher than epsilon: DAPO)"
    )
    loss_type: str = setting(
        "dapo", "how trl weighs tokens: dapo, grpo, dr_grpo, or bnpo (a mean over a forward pass, not over a step)"
    )
    logging_steps: int = setting(1, "steps between log lines")
    eval_steps: int = setting(50, "steps between measurements on the held-out puzzles; 0: never")
    reward_exact: float = setting(1.0, "reward of the exact grid")
    reward_cells: float = setting(0.1, "reward of a wrong grid of the right shape, times its share of right cells")
    reward_shape: float = setting(0.0, "reward of a wrong grid of the right shape, in addition")
    reward_format: float = setting(0.0, "reward of any wrong grid, in addition; other replies earn nothing")
    skip_scan: bool = setting(
        False, "train on all prompts; else only on those that are solved sometimes but not always"
    )
    scan_samples: int = setting(8, "replies to each scanned prompt")
    scan_prompts: int | None = setting(None, "prompts to scan; default: as many as the steps take")
    collapse_guard: bool = setting(True, "keep the adapter that solves most held-out puzzles, and stop a collapse")

    @property
    def rewards(self) -> dict[str, float]:
        """The rewards, as arguments of `component_weights`."""
        names = ("reward_exact", "reward_cells", "reward_shape", "reward_format")
        return {name: getattr(self, name) for name in names}

    def _needs_whole_completions(self) -> list[str]:
        # The flags that exclude --stop_at_error.
        flags = {
            # a stopped completion has no grid to judge
            **{f"--{name} above 0": value > 0 for name, value in self.rewards.items() if name != "reward_exact"},
            # these divide by a completion's tokens, which would weigh it by how early it is wrong
            f"--loss_type {self.loss_type}": self.loss_type in ("grpo", "bnpo"),
            "--lora_dropout above 0": self.lora_dropout > 0,  # completions are sampled from the model in training mode
            "--fast_rollouts true": bool(self.fast_rollouts),
            "--shared_prompts false": self.shared_prompts is False,
        }
        return [flag for flag, is_set in flags.items() if is_set]

    @property
    def needs_sharing(self) -> str | None:
        """The flag, if any, that works only where prompts are shared."""
        if self.shared_prompts:
            return "--shared_prompts true"
        if self.stop_at_error:
            return "--stop_at_error true"
        return "--supervised_weight above 0" if self.supervised_weight else None

    def problems(self) -> list[str]:
        """The problems of these settings, one line each."""
        group, step = self.num_generations, self.per_device_train_batch_size * self.gradient_accumulation_steps
        wrong = {name: value for name, value in self.rewards.items() if name != "reward_exact"}
        exact_earns_most = sum(wrong.values()) < self.reward_exact
        below = "a number from 0, and the rewards of wrong grids together below reward_exact"
        losses = ("dapo", "grpo", "dr_grpo", "bnpo")
        whole = self._needs_whole_completions() if self.stop_at_error else []
        checks = {
            "num_generations": (group >= 2 and step % group == 0, f"2 or more that divide the {step} of a step"),
            "max_steps": (self.max_steps >= 1, "a whole number from 1"),
            "temperature": (0 < self.temperature < float("inf"), "a number above 0"),
            "beta": (0 <= self.beta < float("inf"), "a number from 0"),
            "epsilon": (0 < self.epsilon < 1, "a share above 0 and below 1"),
            "epsilon_high": (0 < self.epsilon_high < float("inf"), "a number above 0"),
            "loss_type": (self.loss_type in losses, " or ".join(losses)),
            "scan_samples": (self.scan_samples >= 2, "a whole number from 2"),
            "scan_prompts": (self.scan_prompts is None or self.scan_prompts >= 1, WHOLE_FROM_1),
            "stop_at_error": (not whole, f"not beside {', '.join(whole)}: see docs/reinforcement-learning.md"),
            "supervised_weight": (0 <= self.supervised_weight < float("inf"), "a number from 0"),
            "supervised_batch_size": (self.supervised_batch_size >= 1, WHOLE_FROM_1),
            "shared_prompts": (
                self.shared_prompts is not False or not self.supervised_weight,
                "not false beside --supervised_weight above 0, whose rows need the same attention",
            ),
            "reward_exact": (0 < self.reward_exact < float("inf"), "a number above 0"),
            **{name: (value >= 0 and (exact_earns_most or value == 0), below) for name, value in wrong.items()},
        }
        return failed_checks(self, checks)


PolicyRun = StageContext[PolicySettings]  # a run of stage 3, as functions of this room take it
