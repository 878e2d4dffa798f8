"""Completions for reinforcement learning: sampled from a plain copy of the model, or along the solutions, in one pass.

A model in training is slow to sample from: its 4-bit layers are dequantised and its adapters multiplied anew for every
token. `RolloutModel` adds them up once a step into plain 16-bit layers, which sampling_tools.DeviceSampler decodes.

Where only the exact grid earns a reward, a completion is decided by its first wrong token: nothing after it can change
the reward, so nothing after it has to be sampled, or learned from: a sum over tokens has the same expected gradient
without them (trl's dapo divides it by the step's tokens besides, which are fewer). Up to that token the completion is
the solution, and what its tokens are chosen from is known from one forward pass over prompt and solution
(`sample_until_wrong`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.device_sampling import DeviceSampler
from arc.decoding.rows import check_numbers
from arc.decoding.sampling import random_draws
from arc.models.folded_lora import folded_throughout
from arc.models.library_patches import plain_class
from arc.models.loading import Precision
from arc.models.lora import EMBEDDING_MODULES
from arc.models.prompt_sharing import solution_logits
from arc.models.weights import summed_weights
from arc.runs.processes import process_count, process_index

if TYPE_CHECKING:
    import torch

CALLS = 1024  # most calls of one step


class RolloutModel:
    """A plain copy of a peft model, whose weights are base + adapters as they are when `update` is called.

    Args:
        trained: the peft model, of either engine.
        dtype: of the copy.

    Attributes:
        model: the copy: a model of transformers without adapters, in evaluation mode.
    """

    def __init__(self, trained: Any, dtype: torch.dtype):
        """See the class; takes the memory of a second model, and brings it up to date."""
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
        """Add up base and adapters into the copy, in float32, rounded once."""
        import torch

        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in summed_weights(self.trained):
                if name in own:  # of tied matrices the copy has one
                    own[name].copy_(value)


def check_vllm(precision: Precision, target_modules: Sequence[str]) -> None:
    """Whether --use_vllm can work here.

    Raises:
        ValueError: no CUDA, no vLLM, or a model that it cannot take.
    """
    import torch

    full = [name for name in EMBEDDING_MODULES if name in target_modules]
    if importlib.util.find_spec("vllm") is None:
        problem = "vLLM is not installed here: pip install vllm (a version that trl supports), or --fast_rollouts true"
    elif not torch.cuda.is_available():
        problem = "vLLM is used on CUDA devices only, and there is none"
    elif precision.engine == "unsloth" and full:
        problem = (
            f"Unsloth's vLLM takes no adapter with matrices that are trained in full ({', '.join(full)}): leave them "
            "out of --target_modules, or use --engine transformers"
        )
    elif precision.engine == "transformers" and precision.load_in_4bit:
        problem = "trl hands vLLM plain weights, no quantised ones: --load_in_4bit false, or --engine unsloth"
    else:
        return
    raise ValueError(f"--use_vllm: {problem}")


class _Numbers:
    """Numbers of completions, on which their random numbers depend: of a step, of a call in it, of its completions."""

    def __init__(self) -> None:
        self.step, self.calls = -1, 0

    def __call__(self, step: int, completions: int) -> range:
        """Of the next call's completions; those of all processes follow each other, as one process would have them."""
        self.step, self.calls = step, self.calls + 1 if step == self.step else 0
        begin = completions * (process_count() * (step * CALLS + self.calls) + process_index())
        return range(begin, begin + completions)


def make_rollouts(
    trained: Any, tokenizer: Any, *, dtype: torch.dtype, max_new_tokens: int, temperature: float, seed: int
) -> Callable[[list[str], Any], dict[str, Any]]:
    """What trl's GRPOTrainer calls for completions (its `rollout_func`), sampled from a copy that follows the training.

    Prompts that a group shares are computed once, rows that have ended are left out, and each completion's random
    numbers depend on the seed, the step and its number alone: a continued run samples what an uninterrupted one does.

    Args:
        trained: the peft model in training.
        tokenizer: of prompts; gives the end token.
        dtype: of the copy.
        max_new_tokens: longest completion.
        temperature: of the sampling.
        seed: of the random numbers.

    Returns:
        A function of prompts (repeated for each completion of their group) and the trainer, which returns their ids,
        the completions' ids, and None for the sampling's log probabilities: trl computes those of the model itself.
    """
    rollout: list[RolloutModel] = []
    samplers: list[DeviceSampler] = []
    updated, numbers_of = -1, _Numbers()

    def roll(prompts: list[str], trainer: Any) -> dict[str, Any]:
        nonlocal updated
        step = trainer.state.global_step
        if not rollout:
            rollout.append(RolloutModel(trained, dtype))
            samplers.append(
                DeviceSampler(
                    rollout[0].model, tokenizer.eos_token_id, max_new_tokens=max_new_tokens, temperature=temperature
                )
            )
        elif step != updated:
            rollout[0].update()
        updated = step
        prompt_ids = tokenizer(prompts)["input_ids"]
        replies = samplers[0].sample(
            [np.array(ids) for ids in prompt_ids], seed=seed, seeds=numbers_of(step, len(prompts)),
            batch_size=len(prompts),
        )  # fmt: skip
        completions = [reply.tokens.tolist() for [reply] in replies]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return roll


def sample_until_wrong(
    model: Any,
    engine: str,
    prompts: Sequence[np.ndarray],
    solutions: Sequence[np.ndarray],
    *,
    seed: int,
    numbers: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[list[np.ndarray]]:
    """Samples of replies, each up to its first token that is not the solution's, that one included.

    They are what token by token sampling with the same random numbers gives, cut off there: until then its context is
    the solution's, so that one forward pass knows all that its tokens are drawn from.

    Args:
        model: a model with packing_tools.use_packed_attention.
        engine: "transformers" or "unsloth".
        prompts: token ids, int64 (tokens,) each.
        solutions: the reply to each, the end token included.
        seed: of the random numbers, from 0.
        numbers: one from 0 for each sample of each prompt, (prompts, samples); each sample's random numbers depend on
            the seed and its number alone, as in sampling_tools.DeviceSampler.sample.
        temperature: logits are divided by it.
        batch_size: prompts computed at once.

    Returns:
        For each prompt its samples, int64 (tokens,) each; one that is all of the solution is the solution.

    Raises:
        NonFiniteAnswersError: the model answers with NaN.
    """
    import torch

    found: list[list[np.ndarray]] = []
    for at in range(0, len(prompts), batch_size):
        part = slice(at, at + batch_size)
        with torch.no_grad(), folded_throughout(model):
            logits = solution_logits(model, engine, prompts[part], solutions[part])
        draws = [  # (tokens, samples) of each prompt
            random_draws(seed, own, len(solution)).T
            for own, solution in zip(numbers[part], solutions[part], strict=True)
        ]
        draws = torch.from_numpy(np.ascontiguousarray(np.concatenate(draws))).to(logits.device)
        # As search_tools.draw_tokens, with one distribution for all samples.
        reached = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
        tokens = torch.searchsorted(reached, draws * reached[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        begin, tokens = 0, tokens.cpu().numpy()
        check_numbers(reached[:, -1].cpu().numpy())
        for solution in solutions[part]:
            own = tokens[begin : begin + len(solution)].T
            wrong = own != solution
            ends = np.where(wrong.any(1), wrong.argmax(1), len(solution) - 1) + 1
            found.append([path[:end].copy() for path, end in zip(own, ends, strict=True)])
            begin += len(solution)
    return found


def make_stopped_rollouts(
    model: Any, engine: str, *, temperature: float, seed: int, batch_size: int
) -> Callable[[list[str], Any], dict[str, Any]]:
    """What trl's GRPOTrainer calls for completions where they end with their first wrong token.

    Args:
        model: the peft model in training, with packing_tools.use_packed_attention.
        engine: "transformers" or "unsloth".
        temperature: of the sampling.
        seed: of the random numbers; they depend on the step and the completion's number besides, see `make_rollouts`.
        batch_size: prompts computed at once.

    Returns:
        A function of prompts (repeated for each completion of their group) and the trainer, whose `rows` are those of
        the prompts, with "prompt_ids" and "solution_ids"; it returns what `make_rollouts`' does.
    """
    numbers_of = _Numbers()

    def roll(prompts: list[str], trainer: Any) -> dict[str, Any]:
        numbers = numbers_of(trainer.state.global_step, len(prompts))
        groups: dict[tuple[str, bytes], list[int]] = {}  # of one prompt views may have different solutions
        for at, prompt in enumerate(prompts):
            groups.setdefault((prompt, trainer.rows[at]["solution_ids"].tobytes()), []).append(at)
        firsts = [trainer.rows[places[0]] for places in groups.values()]
        most = max(map(len, groups.values()))  # of prompts that come twice in a step, some samples are left over
        samples = sample_until_wrong(
            model, engine, [row["prompt_ids"] for row in firsts], [row["solution_ids"] for row in firsts],
            seed=seed, numbers=[[numbers[at] for at in (places * most)[:most]] for places in groups.values()],
            temperature=temperature, batch_size=batch_size,
        )  # fmt: skip
        completions: list[Any] = [None] * len(prompts)
        for places, own in zip(groups.values(), samples, strict=True):
            for at, tokens in zip(places, own, strict=False):
                completions[at] = tokens
        # Arrays: trl makes tensors of them, for which lists of numbers take it a tenth of a second a step.
        ids = [row["prompt_ids"] for row in trainer.rows]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    return roll
