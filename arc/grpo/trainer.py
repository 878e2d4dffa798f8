"""Makes the trainer of stage 3: trl's GRPO, in which the completions of a group can share their prompt."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from arc.grpo.policy_trainer import SharedPromptMixin, StageMixin
from arc.grpo.prompts import PromptRows
from arc.grpo.rollouts import make_rollouts, make_stopped_rollouts
from arc.grpo.settings import PolicyRun
from arc.grpo.sharing import samples_from_copy, shares_prompts
from arc.grpo.supervised_mix import SupervisedMix
from arc.grpo.trial import PolicyTrial
from arc.models.library_patches import plain_module, use_one_gpu
from arc.models.lora import EMBEDDING_MODULES, train_in_float32
from arc.models.packing import use_packed_attention
from arc.training.arguments import common_arguments
from arc.training.batch_planning import compile_layers, plan_batches
from arc.training.data import StageData
from arc.training.optimizers import MUON, optimizer_with_embedding_rate
from arc.training.rows import lazy_dataset, planned_rows

SAME_NAMES = ("num_generations", "temperature", "beta", "epsilon", "epsilon_high", "loss_type")  # in GRPOConfig


def grpo_trainer(
    model: Any, run: PolicyRun, data: StageData, reward_functions: list[Callable[..., Any]], *,
    reward_weights: list[float], max_completion_length: int, chosen: np.ndarray | None = None,
) -> Any:  # fmt: skip
    """trl's GRPOTrainer on the prompts of the samples; Unsloth's version where its engine does not share prompts.

    Where prompts are shared (see `shares_prompts`), the plan of a step is made, printed and stored as `run.plan`.

    Each reward function takes `completion_ids` and `key` and returns a number for each completion; one of weight 0 is
    logged only. `chosen` rows are those of `PromptRows`. The trainer's `computed` says whether completions come from a
    copy and whether prompts are shared.
    """
    from arc.training.callbacks import Plan

    settings, engine = run.settings, run.precision.engine
    from_copy = samples_from_copy(model, settings, engine)
    shared, mix = shares_prompts(model, run), None
    if shared:
        use_packed_attention(model, engine)
        mix = SupervisedMix(run, data) if settings.supervised_weight else None
        plan_step(PolicyTrial(model, run, data, max_completion_length, from_copy, mix), run, mix)
    elif settings.compile_layers:
        compile_layers(model)
    config_class, trl_trainer = grpo_classes(engine, shared)
    arguments = grpo_arguments(config_class, run, reward_weights, max_completion_length)
    optimizer = None  # trl makes one
    if set(settings.target_modules) & set(EMBEDDING_MODULES) or settings.optim == MUON:
        optimizer = optimizer_with_embedding_rate(model, arguments, settings.optim)
    options = {"policy_settings": settings, "engine": engine, "mix": mix} if shared else {}
    trainer = type("StageTrainer", (SharedPromptMixin if shared else StageMixin, trl_trainer), {})(
        callbacks=[Plan(run)],
        model=model,
        reward_funcs=reward_functions,
        rollout_func=rollout_function(model, run, data, arguments, from_copy),
        args=arguments,
        train_dataset=lazy_dataset(PromptRows(data, chosen), prompt_count(run, data, chosen)),
        optimizers=(optimizer, None),
        processing_class=data.tokenizer,
        **options,
    )
    if shared or engine == "transformers":  # trl casts the weights to bfloat16; Unsloth's version does not
        train_in_float32(trainer.model)
    trainer.computed = {"fast_rollouts": from_copy, "shared_prompts": shared}
    return trainer


def plan_step(trial: PolicyTrial, run: PolicyRun, mix: SupervisedMix | None) -> None:
    """Plan how a step is divided, print it and store it as `run.plan`, and in the mix."""
    steps = run.settings.max_steps
    plan = plan_batches(trial, steps=steps, earlier=run.kept_plan())
    run.plan = replace(plan, seconds_per_step=None)  # it was timed without the sampling
    if mix is not None:
        mix.passes = plan.passes
    print(run.plan.describe(steps, "completions"))


def grpo_classes(engine: str, shared: bool) -> tuple[Any, Any]:
    """GRPOConfig and GRPOTrainer of trl. Unsloth has replaced both, if it is imported, and cannot share prompts."""
    if engine == "unsloth" and shared:
        trainer = plain_module("trl.trainer.grpo_trainer").GRPOTrainer
        return plain_module("trl.trainer.grpo_config").GRPOConfig, trainer
    from trl import GRPOConfig, GRPOTrainer

    return GRPOConfig, GRPOTrainer


def grpo_arguments(config_class: Any, run: PolicyRun, reward_weights: list[float], max_completion_length: int) -> Any:
    """The settings as trl's GRPOConfig."""
    settings = run.settings
    arguments = config_class(
        **common_arguments(run),
        **{name: getattr(settings, name) for name in SAME_NAMES},
        max_completion_length=max_completion_length,
        reward_weights=reward_weights,
        mask_truncated_completions=False,  # a reply without an end has no reward; it must be unlearned, not ignored
    )
    use_one_gpu(arguments)
    arguments.embedding_learning_rate = settings.embedding_learning_rate
    return arguments


def rollout_function(
    model: Any, run: PolicyRun, data: StageData, arguments: Any, from_copy: bool
) -> Callable[..., Any] | None:
    """The function that samples completions for trl; None: trl samples with the model's own generate."""
    settings = run.settings
    if not (from_copy or settings.stop_at_error):
        return None
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # trl warns that rollout_func may change
    temperature, seed = settings.temperature, settings.seed
    if settings.stop_at_error:
        size = max(1, arguments.per_device_train_batch_size // settings.num_generations)
        return make_stopped_rollouts(model, run.precision.engine, temperature=temperature, seed=seed, batch_size=size)
    length, dtype = arguments.max_completion_length, run.precision.torch_dtype
    return make_rollouts(model, data.tokenizer, dtype=dtype, max_new_tokens=length, temperature=temperature, seed=seed)


def prompt_count(run: PolicyRun, data: StageData, chosen: np.ndarray | None) -> int:
    """Prompts of the training's dataset, at least as many as the steps take."""
    prompts_per_step = run.settings.samples_per_step // run.settings.num_generations
    if chosen is None:
        return planned_rows(run, data, prompts_per_step)
    # Whole rounds over the chosen rows, because trl leaves out a last, short batch of prompts.
    return len(chosen) * math.ceil(run.settings.max_steps * prompts_per_step / len(chosen))
