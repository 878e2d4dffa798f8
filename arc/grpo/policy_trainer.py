"""What stage 3 changes of trl's GRPO trainer, as mixins: how a step is computed, not what it learns.

Unsloth replaces trl's class when it is imported. So the GRPOTrainer behind the mixins is known only when a trainer is
made (see `arc.grpo.trainer.grpo_classes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arc.grpo.supervised_mix import SupervisedMix
from arc.models.library_patches import decoding_once, let_run_ahead
from arc.models.prompt_sharing import reply_log_probs

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

    from arc.grpo.settings import PolicySettings
else:
    GRPOTrainer = object


class StageMixin(GRPOTrainer):
    """trl's trainer with an optimizer that does not wait for the device."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer, as trl does."""
        super().create_optimizer(*args, **kwargs)
        let_run_ahead(self.optimizer)
        return self.optimizer


class SharedPromptMixin(StageMixin):
    """Computes a prompt once for all completions of its group, and adds stage 2's loss if there is a mix."""

    processing_class: Any  # of trl, like the next
    _buffered_inputs: Any

    def __init__(
        self, *args: Any, policy_settings: PolicySettings, engine: str, mix: SupervisedMix | None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.policy_settings, self.engine, self.mix = policy_settings, engine, mix
        self.rows: list[dict[str, Any]] = []  # of the current prompts; rollouts along the solutions read them

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as trl does; the mix is closed at the end, early or not."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.mix is not None:
                self.mix.close()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.rows = inputs
        with decoding_once(self):
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> Any:
        completions = super()._generate(prompts)
        if self.policy_settings.stop_at_error:  # trl counts them as cut off, because they have no end token
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["completions/stopped_ratio"].append(metrics.pop("completions/clipped_ratio")[-1])
        return completions

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        training, settings = self.model.training, self.policy_settings
        if settings.stop_at_error and training and self.beta == 0 and self.loss_type == "dapo":
            mask = mask_without_advantage(inputs["completion_mask"], inputs["advantages"])
            inputs = inputs | {"completion_mask": mask}
        supervised = None
        if self.mix is not None and training:  # before trl's own loss, after which trl waits for the device
            micro_batch = self._step % self.args.steps_per_generation
            supervised = self.mix.loss(model, self.state.global_step, micro_batch, self.accelerator.device)
        loss = super()._compute_loss(model, inputs)
        if supervised is None:
            return loss
        supervised_loss, mean_of_step = supervised
        if mean_of_step is not None:
            self._metrics["train"]["supervised_loss"].append(mean_of_step)
        return loss + settings.supervised_weight * supervised_loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as trl does, with the mean of the supervised loss over steps and processes."""
        losses = self._metrics["train"].get("supervised_loss")
        if losses:  # tensors until here, so that the steps did not wait for the device
            mean = self.accelerator.reduce(sum(losses) / len(losses), "mean")
            self._metrics["train"]["supervised_loss"] = [mean.item()]
        super().log(logs, *args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # As trl's, but completions are not shuffled before they are divided into micro-batches: groups stay together.
        # The order changes the loss of bnpo only, whose mean is over a micro-batch.
        from trl.trainer.utils import split_tensor_dict

        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        count = self.args.steps_per_generation
        if self._step % (count * self.num_iterations) == 0 or self._buffered_inputs is None:
            completions = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(completions, count)
        return self._buffered_inputs[self._step % count]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
        batch_size: int | None = None, compute_entropy: bool = False, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:  # fmt: skip
        import torch

        ids, mask = input_ids.cpu().numpy(), attention_mask.bool().cpu().numpy()
        begin = ids.shape[1] - logits_to_keep
        prompts = [row[used] for row, used in zip(ids[:, :begin], mask[:, :begin], strict=True)]
        completions = [row[used] for row, used in zip(ids[:, begin:], mask[:, begin:], strict=True)]
        rows = [row for row, completion in enumerate(completions) if len(completion)]
        size, results = batch_size or len(rows), []
        for at in range(0, len(rows), size):
            batch = rows[at : at + size]
            results.append(reply_log_probs(
                model, self.engine, [prompts[row] for row in batch], [completions[row] for row in batch],
                temperature=self.temperature, width=logits_to_keep,
            ))  # fmt: skip
        log_probs, entropies = (torch.cat(tensors) for tensors in zip(*results, strict=True))
        if len(rows) < len(ids):  # completions that are masked as a whole get zeros
            index = torch.tensor(rows, device=log_probs.device)
            log_probs, entropies = (
                tensor.new_zeros((len(ids), logits_to_keep)).index_copy(0, index, tensor)
                for tensor in (log_probs, entropies)
            )
        return log_probs, entropies if compute_entropy else None, None


def mask_without_advantage(mask: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """A completion mask (completions, tokens) that leaves out the completions with advantage 0.

    They add nothing to a loss that is a sum over tokens divided by their number in the step. Without them the update is
    the same and faster. The logged entropy and clipping are then those of the other completions.
    """
    mask = mask.clone()
    unused = mask.new_ones(len(mask)).index_fill(0, advantages.nonzero()[:, 0], 0).bool()
    mask[unused] = 0  # the rows stay: trl gathers one figure per row, and all processes need equally many
    if unused.all():
        mask[0, 0] = 1  # a forward pass needs at least one token
    return mask
