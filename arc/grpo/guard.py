"""Reinforcement learning that does not collapse: the best adapter is kept, and a policy that breaks down is stopped.

`PolicyGuard` measures a fixed set of held-out puzzles before the first step and now and then after it, keeps the
adapter that solved most of them, and stops the training where

- the puzzles solved, or those answered by a grid at all, have clearly fallen below the best, or
- replies that are cut off, or that repeat themselves more than their solutions do, have clearly become more.

Its state is part of each checkpoint (in trainer_state.json, with the best weights in a file beside the checkpoints), so
that a run that was killed and continued decides as an uninterrupted one does. Of several processes each measures the
same puzzles with the same weights and reads the same gathered log, and so decides the same; one writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arc.decoding.greedy import GreedyAnswer, greedy_answers
from arc.decoding.log_probabilities import log_probabilities
from arc.grpo.rewards import repetition
from arc.grpo.settings import PolicySettings
from arc.puzzles.files import write_atomically
from arc.runs.checkpoints import complete_checkpoints
from arc.training.data import StageData
from arc.training.stage import StageContext

STATE = "policy_guard"  # in trainer_state.json
FALL_LEVEL = 0.01  # see `has_fallen`
SMALLEST_FALL = math.ceil(-math.log2(FALL_LEVEL))  # puzzles that must be lost where none is gained
WINDOW, WINDOW_GROUPS = 8, 32  # log lines whose mean is compared, at least, and prompts in them, at least
RISE, RISE_ERRORS = 0.2, 4.0  # see `has_climbed`
# What climbs in a collapse, as trl and reward_tools name it in the log, in words.
CLIMBING = {
    "completions/clipped_ratio": "completions cut off at the longest reply",
    "completions/repetition_excess": "repetition of completions beyond that of their solutions",
}


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def fall_probability(best: Sequence[bool], now: Sequence[bool]) -> float:
    """How probable it is that so many of the puzzles that changed are losses, if losses and gains were equally likely.

    The one-sided exact sign test on paired answers (McNemar's): puzzles that are solved both times, or neither time,
    say nothing about a change.

    Args:
        best, now: whether each puzzle was solved, (puzzles,).
    """
    lost = sum(a and not b for a, b in zip(best, now, strict=True))
    changed = sum(a != b for a, b in zip(best, now, strict=True))
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed


def has_fallen(best: Sequence[bool], now: Sequence[bool], level: float = FALL_LEVEL) -> bool:
    """Whether fewer puzzles are solved (or get a grid) than at the best, clearly so for their number.

    The level is 1%, for two reasons. The best is the highest of several measurements, so that it was lucky too, and
    each further measurement is another chance of a false alarm: with five of them that stays below 5%. At least seven
    puzzles must have been lost (0.5 to the power of 7 is 0.8%), so of a policy that solved fewer nothing clear can be
    said by this; `has_climbed` watches what does not depend on it.

    Args:
        best, now: whether each puzzle was solved, (puzzles,).
        level: of the test.
    """
    return fall_probability(best, now) < level


def has_climbed(shares: Sequence[float], groups: float) -> bool:
    """Whether the newest shares are clearly above those at the start, or above all before them; see `climb`.

    Clearly: by RISE at least, and by RISE_ERRORS standard errors. Completions of one prompt are alike, so the error is
    that of so many prompts, not completions. Four errors, because every log line asks anew: of simulated runs of 250
    steps, four prompts each, in which nothing changes, 3% or fewer raise an alarm, even if all completions of a prompt
    are alike. A policy that breaks down in its first steps has one healthy line, which counts as the one that it is.

    Args:
        shares: means from 0 to 1 of successive log lines, (lines,).
        groups: prompts of one log line.
    """
    newest, befores = climb(shares, groups)
    lines = window(groups)
    for mean, before in befores:
        pooled = (newest * lines + mean * before) / (lines + before)
        # The variance of numbers between 0 and 1 is highest where all are 0 or 1.
        error = math.sqrt(pooled * (1 - pooled) * (1 / lines + 1 / before) / groups) if 0 < pooled < 1 else 0.0
        if newest - mean > max(RISE, RISE_ERRORS * error):
            return True
    return False


def window(groups: float) -> int:
    """Log lines whose mean is compared: WINDOW, or as many as it takes for WINDOW_GROUPS prompts."""
    return max(WINDOW, math.ceil(WINDOW_GROUPS / groups))


def climb(shares: Sequence[float], groups: float) -> tuple[float, list[tuple[float, int]]]:
    """Mean of the newest window of shares, and what it is compared with.

    Args:
        shares, groups: see `has_climbed`.

    Returns:
        The mean, and two times a mean of lines before that window with their number: the first ones, at most a window
        of them, and all of them; nothing while there are none.
    """
    values, lines = np.asarray(shares, dtype=float), window(groups)
    before = values[:-lines]
    if not len(before):
        return math.nan, []
    return float(values[-lines:].mean()), [(float(p.mean()), len(p)) for p in (before[:lines], before)]


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def mean_divergence(model: Any, engine: str, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean KL divergence of the policy to the model without its adapter, over the tokens of replies, in nats.

    Exact at each place (the sum over the vocabulary, no estimate from samples), in the policy's direction: how much it
    says what the start would not have said.

    Args:
        model: a peft model.
        engine: "unsloth" or "transformers".
        rows: a prompt and a reply each, token ids (tokens,).
    """
    total, count = 0.0, 0
    for prompt, reply in rows:
        row = np.concatenate([prompt, reply[:-1]])
        positions = np.arange(len(prompt) - 1, len(row))
        policy = log_probabilities(model, engine, row, positions)
        with model.disable_adapter():
            start = log_probabilities(model, engine, row, positions)
        total += float((policy.exp() * (policy - start)).nan_to_num(0.0).sum())
        count += len(positions)
    return total / max(1, count)


class PolicyGuard:
    """See the module. Made before the training; `watch` is given its `measure`, and `attach` adds it to the trainer.

    Args:
        model: the peft model in training.
        run: settings and folders.
        data: the held-out puzzles.

    Attributes:
        prompts: of the held-out puzzles that are measured; empty: none, and only completions are watched.
        best: of the best adapter {"step", "solved", "decodable"}: for each puzzle whether it was solved, and whether
            its reply was a grid at all, as 0 and 1; None before a measurement.
        reason: why the training was stopped, in words; None if it was not.
    """

    def __init__(self, model: Any, run: StageContext[PolicySettings], data: StageData):
        """See the class."""
        settings = run.settings
        self.model, self.run, self.data = model, run, data
        measured = settings.eval_steps > 0 and settings.eval_puzzles > 0
        self.prompts = data.prompts(settings.eval_puzzles, settings.max_seq_length) if measured else []
        self.best: dict[str, Any] | None = None
        self.reason: str | None = None
        self._weights: dict[str, Any] | None = None  # the best adapter's, in main memory
        self._written: int | None = None  # the step whose weights are in their file
        self._now: dict[str, list[int]] | None = None  # the newest measurement, until it was judged

    def measure(self) -> dict[str, float]:
        """Answer the held-out puzzles greedily.

        Returns:
            For the log: eval_exact_match and eval_decodable (shares), eval_repetition (mean share of repeated n-grams,
            see `reward_tools.repetition`) and eval_kl (see `mean_divergence`).
        """
        settings, engine = self.run.settings, self.run.precision.engine
        answers: list[GreedyAnswer] = greedy_answers(
            self.model, engine, self.data.tokenizer, self.data.heldout, self.prompts,
            batch_size=settings.per_device_eval_batch_size,
        )  # fmt: skip
        self._now = {
            "solved": [int(answer.solved) for answer in answers],
            "decodable": [int(answer.decodable) for answer in answers],
        }
        texts = self.data.tokenizer.batch_decode([answer.tokens for answer in answers])
        rows = [(row["input_ids"], answer.tokens) for row, answer in zip(self.prompts, answers, strict=True)]
        return {
            "eval_exact_match": sum(self._now["solved"]) / len(answers),
            "eval_decodable": sum(self._now["decodable"]) / len(answers),
            "eval_repetition": sum(map(repetition, texts)) / len(texts),
            "eval_kl": mean_divergence(self.model, engine, [row for row in rows if len(row[1])]),
        }

    def attach(self, trainer: Any) -> None:
        """Add the guard to a trainer, after `watch` and before `StageRun.train`."""
        from transformers import TrainerCallback

        guard = self

        class Callback(TrainerCallback):
            """Calls the guard."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                guard._begin(trainer, args, state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                guard._end_step(args, state, control)

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if args.should_save:  # one process of a distributed run
                    guard._write_best()

        trainer.add_callback(Callback())

    def _begin(self, trainer: Any, args: Any, state: Any, control: Any) -> None:
        self.restore(state)
        if state.global_step or not self.prompts or not self.run.settings.collapse_guard:
            return
        # What is not better than the start shall not replace it.
        self.model.train()  # so that decoding hands it back ready for training
        numbers = self.measure()
        state.log_history.append({**numbers, "step": 0})
        trainer.callback_handler.on_log(args, state, control, numbers)
        self._judge(0)
        if len(self.prompts) < SMALLEST_FALL and state.is_world_process_zero:
            print(
                f"note: a fall of the {len(self.prompts)} held-out puzzles that are measured cannot be clear: it takes "
                f"{SMALLEST_FALL} lost ones (--eval_puzzles, --holdout_examples)"
            )

    def _end_step(self, args: Any, state: Any, control: Any) -> None:
        if not self.run.settings.collapse_guard:
            return
        self._judge(state.global_step)
        self._look_at_completions(state)
        if state.global_step >= state.max_steps:
            self.reason = None  # there is nothing left to stop
        state.stateful_callbacks[STATE] = self.state()
        if self.reason:
            if state.is_world_process_zero:
                print(f"stopped after step {state.global_step}: {self.reason}")
            control.should_training_stop = control.should_log = True
            control.should_save = self.run.settings.save_steps != 0

    def _judge(self, step: int) -> None:
        # Compare the newest measurement with the best one: more solved, else more grids, else later: it learned more.
        now, self._now = self._now, None
        if now is None:
            return
        if self.best is None or _rank(now) >= _rank(self.best):
            self.best = {"step": step, **now}
            self._weights, self._written = trained_weights(self.model), None
            return
        for name, words in (("solved", "are solved"), ("decodable", "get a grid as their answer")):
            best = self.best[name]
            if self.reason is None and has_fallen(best, now[name]):
                self.reason = (
                    f"{sum(now[name])} of {len(best)} held-out puzzles {words}, at the best (step "
                    f"{self.best['step']}) {sum(best)} were; by chance that has a probability of "
                    f"{fall_probability(best, now[name]):.2g}"
                )

    def _look_at_completions(self, state: Any) -> None:
        settings = self.run.settings
        groups = settings.logging_steps * settings.samples_per_step / settings.num_generations
        for name, words in CLIMBING.items():
            shares = [line[name] for line in state.log_history if isinstance(line.get(name), (int, float))]
            if self.reason is None and has_climbed(shares, groups):
                newest, befores = climb(shares, groups)
                lowest = min(mean for mean, _ in befores)
                self.reason = f"{words}: {newest:.0%} over the last {window(groups)} log lines, {lowest:.0%} before"

    # -- state: what a continued run needs

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"best": self.best, "reason": self.reason}

    def restore(self, state: Any) -> None:
        """Take up what a checkpoint's state holds, and the best weights with it; what is missing is said."""
        kept = (state.stateful_callbacks or {}).get(STATE)
        if not kept or not self.run.settings.collapse_guard:
            return
        self.best, self.reason = kept["best"], kept["reason"]
        if self.best is None:
            return
        path = self._path(self.best["step"])
        try:
            self._weights, self._written = read_weights(path), self.best["step"]
        except (OSError, ValueError) as error:
            print(f"note: the best adapter, of step {self.best['step']}, is lost ({error}): the search begins anew")
            self.best = None

    def _path(self, step: int) -> Path:
        return self.run.work / f"best-{step}.safetensors"

    def _write_best(self) -> None:
        # Called before the checkpoint counts as complete: one that names a best adapter has its file.
        if self.best is None or self._weights is None:
            return
        if self._written != self.best["step"]:  # a file of that name would be of a run that was killed before this one
            write_weights(self._weights, self._path(self.best["step"]))
            self._written = self.best["step"]
        named = {self.best["step"]}
        for checkpoint in complete_checkpoints(self.run.work, quiet=True):
            best = (stored_guard(checkpoint) or {}).get("best")
            named |= {best["step"]} if best else set()
        for old in self.run.work.glob("best-*.safetensors"):
            if old not in {self._path(step) for step in named}:
                old.unlink()

    def keep_best(self, trainer: Any) -> dict[str, Any]:
        """After the training: give the model the best adapter's weights, and say which step they are of.

        Returns:
            For the manifest: {"policy": {"step": of the weights, "last_step": of the training, "heldout_solved": of
            "heldout_puzzles" (None: not measured), "stopped": why, or None}}.
        """
        last = trainer.state.global_step
        about = {"step": last, "last_step": last, "heldout_solved": None, "heldout_puzzles": len(self.prompts)}
        if self.run.settings.collapse_guard:
            if self.best is None:  # the training had been done by an earlier run
                self.restore(trainer.state)
            if self.best is not None:
                about |= {"step": self.best["step"], "heldout_solved": sum(self.best["solved"])}
        if about["step"] != last:
            load_weights(self.model, self._weights)
        if self.best is not None and trainer.is_world_process_zero():
            print(
                f"kept: the adapter of step {about['step']} of {last}, which solves {about['heldout_solved']} of "
                f"{about['heldout_puzzles']} held-out puzzles"
            )
        return {"policy": {**about, "stopped": self.reason}}


def _rank(measured: dict[str, Any]) -> tuple[int, int]:
    return sum(measured["solved"]), sum(measured["decodable"])


def stored_guard(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint holds of a guard, see `PolicyGuard.state`; None if it has none."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return (state.get("stateful_callbacks") or {}).get(STATE)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def trained_weights(model: Any) -> dict[str, Any]:
    """Copies of all trainable weights in main memory, by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_weights(model: Any, weights: dict[str, Any]) -> None:
    """Give a model trainable weights that `trained_weights` copied from it.

    Raises:
        ValueError: other names or shapes than the model's.
    """
    import torch

    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    other = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
    if other:
        raise ValueError(f"the best adapter's weights are of another model: {other[0]} differs")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def write_weights(weights: dict[str, Any], path: Path) -> None:
    """Write weights as safetensors, beside their place first: a file of that name is whole."""
    from safetensors.torch import save_file

    write_atomically(path, lambda beside: save_file(weights, str(beside)))


def read_weights(path: Path) -> dict[str, Any]:
    """Weights that `write_weights` wrote.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
