"""Completions for reinforcement learning, sampled from a plain copy of the model or along the solutions.

A model in training is slow to sample from: each token dequantises the 4-bit layers and multiplies the adapters anew.
`RolloutModel` adds base and adapters once per step into plain 16-bit layers, which `DeviceSampler` decodes.

Where only the exact grid earns a reward, the first wrong token of a completion decides it. Later tokens need neither
sampling nor learning: a sum over tokens has the same expected gradient without them. (trl's dapo also divides by the
tokens of the step, which are fewer then.) Up to its first wrong token a completion equals the solution. So one forward
pass over prompt and solution gives the distribution of each token (`sample_until_wrong`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.device_sampling import DeviceSampler
from arc.decoding.rows import check_numbers
from arc.decoding.sampling import random_draws
from arc.models.folded_lora import folded_throughout
from arc.models.library_patches import plain_class
from arc.models.prompt_sharing import solution_logits
from arc.models.weights import summed_weights
from arc.runs.processes import process_count, process_index

if TYPE_CHECKING:
    import torch

CALLS = 1024  # the random numbers allow this many calls in a step


class RolloutModel:
    """A plain copy of a peft model of either engine. Its weights are base + adapters at the last call of `update`.

    `model` is the copy: of transformers, without adapters, in evaluation mode. It takes the memory of a second model.
    """

    def __init__(self, trained: Any, dtype: torch.dtype):
        import copy

        import torch
        from transformers.initialization import no_init_weights

        self.trained = trained
        base = trained.get_base_model()
        device = trained.get_input_embeddings().weight.device
        config = copy.deepcopy(base.config)
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, name):
                delattr(config, name)
        config.dtype = dtype
        with no_init_weights(), torch.device(device):
            model = plain_class(type(base))(config)
        self.model = model.to(dtype).eval().requires_grad_(False)
        if config.tie_word_embeddings:
            self.model.tie_weights()
        self.update()

    def update(self) -> None:
        """Copy base + adapters into the copy: summed in float32, rounded once."""
        import torch

        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in summed_weights(self.trained):
                if name in parameters:  # the copy has one name for tied matrices
                    parameters[name].copy_(value)


class CompletionNumbers:
    """Numbers the completions of a run."""

    def __init__(self) -> None:
        self.step, self.calls = -1, 0

    def next(self, step: int, completions: int) -> range:
        """Numbers of the completions that this process samples next; `step` counts the optimizer steps so far."""
        self.step, self.calls = step, self.calls + 1 if step == self.step else 0
        begin = completions * (process_count() * (step * CALLS + self.calls) + process_index())
        return range(begin, begin + completions)


def make_rollouts(
    trained: Any, tokenizer: Any, *, dtype: torch.dtype, max_new_tokens: int, temperature: float, seed: int
) -> Callable[[list[str], Any], dict[str, Any]]:
    """A `rollout_func` for trl's GRPOTrainer that samples from a copy of the peft model, updated in each step.

    Prompts that a group shares are computed once. A completion's random numbers depend on the seed, the step and its
    number alone, so a continued run samples what an uninterrupted one does.

    Returns:
        A function from prompts (repeated for each completion of their group) and the trainer to "prompt_ids",
        "completion_ids" and "logprobs". The last is None: trl computes log probabilities with the model itself.
    """
    copy: RolloutModel | None = None
    sampler: DeviceSampler | None = None
    updated, numbers = -1, CompletionNumbers()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        nonlocal copy, sampler, updated
        step = trainer.state.global_step
        if copy is None or sampler is None:
            copy = RolloutModel(trained, dtype)
            sampler = DeviceSampler(
                copy.model, tokenizer.eos_token_id, max_new_tokens=max_new_tokens, temperature=temperature
            )
        elif step != updated:
            copy.update()
        updated = step
        prompt_ids = tokenizer(prompts)["input_ids"]
        replies = sampler.sample(
            [np.array(ids) for ids in prompt_ids], seed=seed, seeds=numbers.next(step, len(prompts)),
            batch_size=len(prompts),
        )  # fmt: skip
        completions = [reply.tokens.tolist() for [reply] in replies]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return rollout


def sample_until_wrong(
    model: Any, engine: str, prompts: Sequence[np.ndarray], solutions: Sequence[np.ndarray], *, seed: int,
    numbers: Sequence[Sequence[int]], temperature: float = 1.0, batch_size: int = 64,
) -> list[list[np.ndarray]]:  # fmt: skip
    """Sample replies, each up to and including its first token that differs from the solution.

    The result equals sampling token by token with the same random numbers, cut off there.

    Args:
        model, engine: a model with `use_packed_attention`; "transformers" or "unsloth".
        prompts, solutions: token ids, int64 (tokens,) each; solutions with their end token.
        seed, numbers: decide a sample's random numbers, as in `DeviceSampler.sample`; `numbers` are (prompts, samples).
        batch_size: prompts computed at once.

    Returns:
        For each prompt its samples, int64 (tokens,) each. A sample that is right to its end equals the solution.

    Raises:
        NonFiniteAnswersError: the model answers with NaN.
    """
    import torch

    samples: list[list[np.ndarray]] = []
    for begin in range(0, len(prompts), batch_size):
        batch = slice(begin, begin + batch_size)
        with torch.no_grad(), folded_throughout(model):
            logits = solution_logits(model, engine, prompts[batch], solutions[batch])
        draws = [  # (tokens, samples) of each prompt
            random_draws(seed, of_prompt, len(solution)).T
            for of_prompt, solution in zip(numbers[batch], solutions[batch], strict=True)
        ]
        thresholds = torch.from_numpy(np.ascontiguousarray(np.concatenate(draws))).to(logits.device)
        # As in draw_tokens of arc.decoding.sampling, with one distribution for all samples.
        cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
        tokens = torch.searchsorted(cumulative, thresholds * cumulative[:, -1:], right=True)
        drawn = tokens.clamp(max=logits.shape[-1] - 1).cpu().numpy()  # (tokens of all solutions, samples)
        check_numbers(cumulative[:, -1].cpu().numpy())
        ends = np.cumsum([len(solution) for solution in solutions[batch]])
        for solution, columns in zip(solutions[batch], np.split(drawn, ends[:-1]), strict=True):
            wrong = columns.T != solution  # (samples, tokens of the solution)
            lengths = np.where(wrong.any(1), wrong.argmax(1), len(solution) - 1) + 1
            samples.append([row[:length].copy() for row, length in zip(columns.T, lengths, strict=True)])
    return samples


def make_stopped_rollouts(
    model: Any, engine: str, *, temperature: float, seed: int, batch_size: int
) -> Callable[[list[str], Any], dict[str, Any]]:
    """A `rollout_func` for trl's GRPOTrainer whose completions end with their first wrong token.

    Its arguments and result are those of `make_rollouts`. The trainer's `rows` are those of the prompts. `model` has
    `use_packed_attention`, and computes `batch_size` prompts at once.
    """
    completion_numbers = CompletionNumbers()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        rows = trainer.rows
        numbers = completion_numbers.next(trainer.state.global_step, len(prompts))
        # Completions of the same prompt and solution. Two views of a puzzle may have one prompt and two solutions.
        groups: dict[tuple[str, bytes], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault((prompt, rows[index]["solution_ids"].tobytes()), []).append(index)
        first_rows = [rows[indices[0]] for indices in groups.values()]
        largest = max(map(len, groups.values()))  # smaller groups repeat their numbers; these samples are not used
        samples = sample_until_wrong(
            model, engine, [row["prompt_ids"] for row in first_rows], [row["solution_ids"] for row in first_rows],
            seed=seed, temperature=temperature, batch_size=batch_size,
            numbers=[[numbers[index] for index in (indices * largest)[:largest]] for indices in groups.values()],
        )  # fmt: skip
        completions: list[Any] = [None] * len(prompts)
        for indices, group in zip(groups.values(), samples, strict=True):
            for index, tokens in zip(indices, group, strict=False):
                completions[index] = tokens
        # Arrays, not lists: trl makes tensors of them, which takes a tenth of a second a step for lists.
        return {"prompt_ids": [row["prompt_ids"] for row in rows], "completion_ids": completions, "logprobs": None}

    return rollout
