"""The trainer of stage 3: trl's GRPO, with completions and updates that compute a shared prompt once.

trl decides what a step of GRPO is: groups, advantages, loss, figures. Here are its prompts, where its completions come
from (rollout_tools), how their log probabilities are computed (prompt_sharing) and in how many passes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.device_sampling import KEPT
from arc.grpo.prompts import PromptRows
from arc.grpo.rollouts import make_rollouts, make_stopped_rollouts
from arc.grpo.settings import PolicySettings
from arc.grpo.supervised_mix import MASKED_REPLIES, SupervisedMix, ends_with_training, learned_tokens
from arc.models.library_patches import decoding_once, let_run_ahead, plain_module, use_one_gpu
from arc.models.lora import EMBEDDING_MODULES, train_in_float32
from arc.models.packing import can_pack, check_full_attention, use_packed_attention
from arc.models.prompt_sharing import reply_log_probs
from arc.runs.needs import count_weights
from arc.runs.processes import process_count
from arc.training.arguments import common_arguments
from arc.training.batch_planning import compile_layers, plan_batches
from arc.training.data import StageData
from arc.training.optimizers import MUON, optimizer_with_embedding_rate
from arc.training.rows import lazy_dataset, planned_rows
from arc.training.stage import BatchPlan, StageContext
from arc.training.trainer import kept_in_checkpoints
from arc.training.trials import Trial, uniform_row

if TYPE_CHECKING:
    import torch


ROOM_FOR_COPY = 6  # times the plain copy of the model: from this GPU memory on, completions are sampled from one


def grpo_trainer(
    model: Any,
    run: StageContext[PolicySettings],
    data: StageData,
    reward_functions: list[Callable[..., Any]],
    *,
    reward_weights: list[float],
    max_completion_length: int,
    chosen: np.ndarray | None = None,
) -> Any:
    """trl's GRPOTrainer on the prompts of the samples.

    Where prompts are shared (see `shares_prompts`) it is trl's own on both engines, and how a step is computed is
    decided here (see `batch_planning.plan_batches`), printed, and kept as `run.plan`. Otherwise it is what Unsloth
    makes of it on its engine.

    Args:
        model: a peft model.
        run: settings, precision and folders.
        data: prompts and tokenizer.
        reward_functions: each takes `completion_ids` and `key` and returns a number for each completion.
        reward_weights: one for each function; 0 only logs.
        max_completion_length: tokens of the longest reply.
        chosen: rows of the first epoch that are trained on, see `PromptRows`; None: all.

    Returns:
        The trainer; its `computed` says what --fast_rollouts and --shared_prompts came to.
    """
    settings, precision = run.settings, run.precision
    from_copy = samples_from_copy(model, settings, precision.engine)
    shared, mix = shares_prompts(model, run), None
    if shared:
        use_packed_attention(model, precision.engine)
        if settings.supervised_weight:
            mix = SupervisedMix(run, data)
        trial = PolicyTrial(model, run, data, max_completion_length, from_copy, mix)
        run.plan = plan_batches(trial, steps=settings.max_steps, kept=run.kept_plan())
        run.plan = replace(run.plan, seconds_per_step=None)  # where divisions were compared: the sampling is not in it
        if mix is not None:
            mix.passes = run.plan.passes
        print(run.plan.describe(settings.max_steps, "completions"))
    elif settings.compile_layers:
        compile_layers(model)
    if shared and precision.engine == "unsloth":
        GRPOTrainer = plain_module("trl.trainer.grpo_trainer").GRPOTrainer  # noqa: N806
        GRPOConfig = plain_module("trl.trainer.grpo_config").GRPOConfig  # noqa: N806
    else:
        from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    arguments = GRPOConfig(
        **common_arguments(run),
        num_generations=settings.num_generations,
        max_completion_length=max_completion_length,
        temperature=settings.temperature,
        beta=settings.beta,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss_type,
        reward_weights=reward_weights,
        mask_truncated_completions=False,  # a reply without an end earns nothing: it shall be unlearned, not overlooked
        use_vllm=settings.use_vllm,
        # Its cache is sized by it; a prompt fits max_seq_length with its own reply, not with the longest one.
        vllm_max_model_length=settings.max_seq_length + max_completion_length if settings.use_vllm else None,
    )
    use_one_gpu(arguments)
    arguments.embedding_learning_rate = settings.embedding_learning_rate
    optimizer = None  # trl makes it
    if set(settings.target_modules) & set(EMBEDDING_MODULES) or settings.optim == MUON:
        optimizer = optimizer_with_embedding_rate(model, arguments, settings.optim)
    rollouts = None  # trl samples by transformers' generate
    if from_copy or settings.stop_at_error:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # trl says of its rollout_func that it may change
    if settings.stop_at_error:
        rollouts = make_stopped_rollouts(
            model, precision.engine, temperature=settings.temperature, seed=settings.seed,
            batch_size=max(1, arguments.per_device_train_batch_size // settings.num_generations),
        )  # fmt: skip
    elif from_copy:
        rollouts = make_rollouts(
            model, data.tokenizer, dtype=precision.torch_dtype, max_new_tokens=max_completion_length,
            temperature=settings.temperature, seed=settings.seed,
        )  # fmt: skip
    prompts_per_step = settings.samples_per_step // settings.num_generations
    rows = planned_rows(run, data, prompts_per_step)
    if chosen is not None:  # as many rounds as the steps take: trl leaves a last, short batch of prompts out
        rows = len(chosen) * math.ceil(settings.max_steps * prompts_per_step / len(chosen))

    class StageTrainer(GRPOTrainer):
        """trl's trainer; its optimizer does not wait for the device, and a prompt is computed once for its group."""

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            super().create_optimizer(*args, **kwargs)
            let_run_ahead(self.optimizer)
            return self.optimizer

    class SharingTrainer(StageTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            self.rows = inputs  # for rollouts along the solutions
            with decoding_once(self):
                return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts: list[Any]) -> Any:
            found = super()._generate(prompts)
            if settings.stop_at_error:  # what trl counts as cut off are those
                metrics = self._metrics["train" if self.model.training else "eval"]
                metrics["completions/stopped_ratio"].append(metrics.pop("completions/clipped_ratio")[-1])
            return found

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            # Completions without advantage, those of groups that are all right or all wrong, add nothing to a loss that
            # is a sum over tokens divided by their number in the step: the update does without them. What is logged of
            # the policy (entropy, clipping) is then of the others.
            advantages = inputs["advantages"]
            if settings.stop_at_error and self.model.training and self.beta == 0 and self.loss_type == "dapo":
                mask = inputs["completion_mask"].clone()
                left = mask.new_ones(len(mask)).index_fill(0, advantages.nonzero()[:, 0], 0).bool()
                mask[left] = 0  # not cut out: trl gathers a figure for each row of all processes, as many of each
                if left.all():
                    mask[0, 0] = 1  # a pass has to compute something
                inputs = inputs | {"completion_mask": mask}
            found = None
            if mix is not None and self.model.training:  # first: trl waits for the device after its own
                part = self._step % self.args.steps_per_generation
                found = mix.loss(model, self.state.global_step, part, self.accelerator.device)
            loss = super()._compute_loss(model, inputs)
            if found is None:
                return loss
            if found[1] is not None:  # of the step
                self._metrics["train"]["supervised_loss"].append(found[1])
            return loss + settings.supervised_weight * found[0]

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            losses = self._metrics["train"].get("supervised_loss")
            if losses:  # the device is asked for them here
                mean = self.accelerator.reduce(sum(losses) / len(losses), "mean")
                self._metrics["train"]["supervised_loss"] = [mean.item()]
            super().log(logs, *args, **kwargs)

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            # As trl's, but that completions are not shuffled before they are divided into passes: groups stay together.
            # Its losses are sums over all passes of a step, so that only bnpo's knows the difference.
            if not self.model.training:
                return super()._prepare_inputs(generation_batch)
            parts = self.args.steps_per_generation
            if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
                found = self._generate_and_score_completions(generation_batch)
                self._buffered_inputs = split_tensor_dict(found, parts)
            return self._buffered_inputs[self._step % parts]

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
            batch_size: int | None = None, compute_entropy: bool = False, **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None, None]:  # fmt: skip
            import torch

            ids, mask = input_ids.cpu().numpy(), attention_mask.bool().cpu().numpy()
            width = ids.shape[1] - logits_to_keep
            prompts = [row[kept] for row, kept in zip(ids[:, :width], mask[:, :width], strict=True)]
            replies = [row[kept] for row, kept in zip(ids[:, width:], mask[:, width:], strict=True)]
            kept = [at for at, reply in enumerate(replies) if len(reply)]
            prompts, replies = [prompts[at] for at in kept], [replies[at] for at in kept]
            found = []
            for at in range(0, len(kept), batch_size or len(kept)):
                part = slice(at, at + (batch_size or len(kept)))
                found.append(
                    reply_log_probs(
                        model, precision.engine, prompts[part], replies[part], temperature=self.temperature,
                        width=logits_to_keep,
                    )
                )  # fmt: skip
            log_probs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
            if len(kept) < len(ids):
                at = torch.tensor(kept, device=log_probs.device)
                log_probs, entropies = (
                    part.new_zeros((len(ids), logits_to_keep)).index_copy(0, at, part)
                    for part in (log_probs, entropies)
                )
            return log_probs, entropies if compute_entropy else None, None

    callbacks = [kept_in_checkpoints(run)]
    if mix is not None:
        callbacks.append(ends_with_training(mix))
    trainer = (SharingTrainer if shared else StageTrainer)(
        callbacks=callbacks,
        model=model,
        reward_funcs=reward_functions,
        rollout_func=rollouts,
        args=arguments,
        train_dataset=lazy_dataset(PromptRows(data, chosen), rows),
        optimizers=(optimizer, None),
        processing_class=data.tokenizer,
    )
    if shared or precision.engine == "transformers":  # what Unsloth makes of trl does not
        train_in_float32(trainer.model)  # trl rounds the trainable weights of a 4-bit base to bfloat16
    trainer.computed = {"fast_rollouts": from_copy, "shared_prompts": shared}
    return trainer


def samples_from_copy(model: Any, settings: Any, engine: str) -> bool:
    """Whether completions are sampled from a plain copy of the model: as the settings say, else where there is room.

    Args:
        model: the peft model that will be trained.
        settings: of stage 3.
        engine: "transformers" or "unsloth".
    """
    import torch

    if settings.fast_rollouts is not None or settings.use_vllm or not torch.cuda.is_available():
        return bool(settings.fast_rollouts)
    if settings.stop_at_error:
        return False  # nothing is sampled token by token
    if settings.shares_always and engine == "unsloth":
        return True  # it shares them only so
    return torch.cuda.get_device_properties(0).total_memory >= ROOM_FOR_COPY * copy_bytes(model, settings)


def copy_bytes(model: Any, settings: Any) -> int:
    """Memory of a plain 16-bit copy of a model."""
    return 2 * count_weights(model.config, target_modules=settings.target_modules, r=settings.lora_r).model


def shares_prompts(model: Any, run: StageContext[PolicySettings]) -> bool:
    """Whether a prompt is computed once for all completions of its group: as the settings say, else where it can be.

    Args:
        model: the peft model that will be trained.
        run: settings and precision.
    """
    if run.settings.shares_always:
        return True
    if run.settings.shared_prompts is False or run.settings.use_vllm:  # its memory would be missing in the plan
        return False
    if run.precision.engine == "unsloth" and not samples_from_copy(model, run.settings, run.precision.engine):
        return False  # Unsloth's generate, and its vLLM, are its own trainer's
    return can_pack(model, run.precision.torch_dtype)


def check_sharing(run: StageContext[PolicySettings]) -> None:
    """Whether what is computed only where prompts are shared can be had.

    Raises:
        ValueError: not on this engine, with these settings or with this model.
    """
    from transformers import AutoConfig

    settings = run.settings
    asked = settings.shares_always
    if asked is None:
        return
    if settings.use_vllm:
        raise ValueError(f"{asked}: not beside --use_vllm, which has a trainer of its own")
    if run.precision.engine == "unsloth" and settings.fast_rollouts is False and not settings.stop_at_error:
        raise ValueError(f"{asked}: on the Unsloth engine not with --fast_rollouts false")
    if settings.supervised_weight and settings.supervised_batch_size % process_count():
        raise ValueError(
            f"--supervised_batch_size {settings.supervised_batch_size}: {process_count()} processes cannot divide it"
        )
    check_full_attention(AutoConfig.from_pretrained(run.parent))


class PolicyTrial(Trial[PolicySettings]):
    """Passes of the reinforcement learning: a batch is prompts, one for each completion, completions, and what else.

    Args:
        model, run: see `Trial`.
        data: puzzles with their replies.
        max_completion_length: tokens of the longest completion.
        from_copy: completions are sampled from a copy of the model, which takes its memory.
        mix: what is learned besides; None: nothing.
    """

    padding_free = True
    tells_time = False  # the sampling would not be in it

    def __init__(
        self, model: Any, run: StageContext[PolicySettings], data: StageData, max_completion_length: int,
        from_copy: bool, mix: SupervisedMix | None = None,
    ):  # fmt: skip
        """See the class."""
        import torch

        kept = 0
        if from_copy and torch.cuda.is_available():
            kept = copy_bytes(model, run.settings)
            kept += math.ceil(KEPT * torch.cuda.get_device_properties(0).total_memory)
        super().__init__(model, run, kept)
        if run.settings.beta > 0:  # trl keeps the adapter as it was
            self.more += 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.samples, self.length, self.group = data.samples, max_completion_length, run.settings.num_generations
        self.mix, self.of_step = mix, run.settings.samples_per_step // process_count()

    def longest(self, size: int) -> Any:
        """As many different prompts as there can be."""
        rng = np.random.default_rng(0)
        vocabulary = self.model.config.vocab_size
        count = min(size, math.ceil(self.of_step / self.group) + (process_count() > 1))
        prompts = [rng.integers(0, vocabulary, self.run.settings.max_seq_length) for _ in range(count)]
        different = count if self.run.settings.stop_at_error else size  # those that are stopped follow one solution
        replies = [rng.integers(0, vocabulary, self.length) for _ in range(different)]
        more = None
        if self.mix is not None:
            tokens = min(self.run.settings.max_seq_length, int(self.samples.lengths().max()))
            row = uniform_row(tokens, MASKED_REPLIES, vocabulary)
            more = self.mix.collator([row] * self.mix.rows_of_pass(size, self.of_step))
        return (
            [prompts[at * count // size] for at in range(size)],
            [replies[at * different // size] for at in range(size)],
            more,
        )

    def typical(self, size: int) -> list[Any]:
        """The first prompts, with replies as long as their solutions: alike in a group only where they are stopped."""
        own, rng = max(1, size // self.group), np.random.default_rng(0)
        vocabulary = self.model.config.vocab_size
        found = []
        for at in (0, own):
            rows = self.samples.__getitems__(list(range(at, at + own)))
            parts = [(row["input_ids"], int(row["reply_spans"][-1][0])) for row in rows]
            parts = [parts[number * own // size] for number in range(size)]
            replies = [ids[begin:][: self.length] for ids, begin in parts]
            if not self.run.settings.stop_at_error:
                replies = [rng.integers(0, vocabulary, len(reply)) for reply in replies]
            more = None
            if self.mix is not None:
                step = self.mix.rows(len(found))
                more = self.mix.collator(self.samples.__getitems__(step[: self.mix.rows_of_pass(size, self.of_step)]))
            found.append(([ids[:begin] for ids, begin in parts], replies, more))
        return found

    def tokens(self, batch: Any) -> int:
        """Of the completions: what comes with them is about as much in each."""
        return sum(map(len, batch[1]))

    def tokens_per_step(self, plan: BatchPlan) -> float:
        """Those of the batch that is timed."""
        return float(self.tokens(self.typical(plan.micro_batch_size)[-1]) * plan.passes)

    def loss(self, batch: Any) -> torch.Tensor:
        """A sum over all tokens, as GRPO's; and what is learned besides."""
        from accelerate.utils import send_to_device

        prompts, replies, more = batch
        loss = reply_log_probs(self.model, self.run.precision.engine, prompts, replies)[0].mean()
        if more is None:
            return loss
        return loss + self.mix.divided_sum(self.model, send_to_device(more, self.device), learned_tokens(more))
