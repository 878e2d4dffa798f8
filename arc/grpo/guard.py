"""Keeps the best adapter of a reinforcement learning, and stops a policy that collapses.

`PolicyGuard` measures a fixed set of held-out puzzles before the first step and at intervals. It stops the training

- when clearly fewer puzzles are solved, or get a grid as their answer, than at the best measurement;
- when clearly more completions are cut off, or repeat themselves more than their solutions do.

Its state is in trainer_state.json, the best weights are in a file beside the checkpoints. So a continued run decides as
an uninterrupted one. All processes measure the same and decide the same; the main process writes.
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
from arc.grpo.settings import PolicyRun
from arc.puzzles.files import write_atomically
from arc.runs.checkpoints import complete_checkpoints
from arc.training.data import StageData

STATE = "policy_guard"  # in trainer_state.json
FALL_LEVEL = 0.01  # see `has_fallen`
SMALLEST_FALL = math.ceil(-math.log2(FALL_LEVEL))  # lost puzzles that are clear where none is gained
WINDOW, WINDOW_GROUPS = 8, 32  # the compared mean is over at least so many log lines and prompts
RISE, RISE_ERRORS = 0.2, 4.0  # see `climb`
# Logged shares that rise in a collapse, and what to call them.
CLIMBING = {
    "completions/clipped_ratio": "completions cut off at the longest reply",
    "completions/repetition_excess": "repetition of completions beyond that of their solutions",
}


def fall_probability(best: Sequence[int], now: Sequence[int]) -> float:
    """The probability of so many losses among the changed puzzles, if losses and gains were equally likely.

    `best` and `now` are 0 or 1 for each puzzle, (puzzles,). This is the one-sided exact sign test on paired answers
    (McNemar's test). Puzzles without a change do not count.
    """
    lost = sum(a and not b for a, b in zip(best, now, strict=True))
    changed = sum(a != b for a, b in zip(best, now, strict=True))
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed


def has_fallen(best: Sequence[int], now: Sequence[int]) -> bool:
    """Whether clearly fewer puzzles are solved (or get a grid) than at the best; arguments as `fall_probability`.

    The level is 1%: the best of several measurements was also lucky, and each measurement may raise a false alarm
    (below 5% with five of them). A clear fall takes at least seven lost puzzles: 0.5 ** 7 is 0.8%.
    """
    return fall_probability(best, now) < FALL_LEVEL


def climb(shares: Sequence[float], groups: float) -> tuple[float, float, int] | None:
    """The climb of a share: its newest mean, its lowest earlier mean, and the log lines of a mean; None if not clear.

    `shares` are means from 0 to 1 of successive log lines, (lines,); `groups` are the prompts of one line. The newest
    mean is compared with that of the first lines and that of all earlier lines, of which one is enough. It is clearly
    higher if by RISE, and by RISE_ERRORS standard errors. The error counts prompts, because completions of one prompt
    are alike. Four errors, because every log line tests again: at most 3% of simulated runs of 250 steps in which
    nothing changes raise an alarm.
    """
    values, lines = np.asarray(shares, dtype=float), max(WINDOW, math.ceil(WINDOW_GROUPS / groups))
    earlier = values[:-lines]
    if not len(earlier):
        return None
    newest = float(values[-lines:].mean())
    means = [(float(some.mean()), len(some)) for some in (earlier[:lines], earlier)]
    for mean, count in means:
        pooled = (newest * lines + mean * count) / (lines + count)
        # The variance of numbers between 0 and 1 is highest where all are 0 or 1.
        error = math.sqrt(pooled * (1 - pooled) * (1 / lines + 1 / count) / groups) if 0 < pooled < 1 else 0.0
        if newest - mean > max(RISE, RISE_ERRORS * error):
            return newest, min(means)[0], lines
    return None


def mean_divergence(model: Any, engine: str, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean KL divergence of a peft model to the model without its adapter, over the tokens of replies, in nats.

    `rows` are pairs of prompt and reply, int64 (tokens,). At each token KL(policy || start) is summed over the
    vocabulary.
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
    """Keeps the best adapter and stops a collapse. `watch` gets its `measure`, then `attach` adds it to the trainer.

    `prompts` are those of the measured held-out puzzles. If there are none, only completions are watched.
    """

    def __init__(self, model: Any, run: PolicyRun, data: StageData):
        settings = run.settings
        self.model, self.run, self.data = model, run, data
        measured = settings.eval_steps > 0 and settings.eval_puzzles > 0
        self.prompts = data.prompts(settings.eval_puzzles, settings.max_seq_length) if measured else []
        # The best adapter's "step", and for each puzzle 1 or 0 for "solved" and for "decodable" (the reply is a grid).
        self.best: dict[str, Any] | None = None
        self.reason: str | None = None  # why the training was stopped
        self._weights: dict[str, Any] = {}  # the best adapter's, in main memory
        self._written: int | None = None  # the step whose weights are in their file
        self._newest: dict[str, list[int]] | None = None  # a measurement that was not yet compared with the best

    def measure(self) -> dict[str, float]:
        """Answer the held-out puzzles greedily; returns shares of them, `repetition` and `mean_divergence` to log."""
        engine = self.run.precision.engine
        answers: list[GreedyAnswer] = greedy_answers(
            self.model, engine, self.data.tokenizer, self.data.heldout, self.prompts,
            batch_size=self.run.settings.per_device_eval_batch_size,
        )  # fmt: skip
        solved, decodable = [int(answer.solved) for answer in answers], [int(answer.decodable) for answer in answers]
        self._newest = {"solved": solved, "decodable": decodable}
        texts = self.data.tokenizer.batch_decode([answer.tokens for answer in answers])
        rows = [(row["input_ids"], answer.tokens) for row, answer in zip(self.prompts, answers, strict=True)]
        return {
            "eval_exact_match": sum(solved) / len(answers),
            "eval_decodable": sum(decodable) / len(answers),
            "eval_repetition": sum(map(repetition, texts)) / len(answers),
            "eval_kl": mean_divergence(self.model, engine, [row for row in rows if len(row[1])]),
        }

    def attach(self, trainer: Any) -> None:
        """Add the guard's callback to a trainer, after `watch` and before the training."""
        from transformers import TrainerCallback

        guard = self

        class GuardCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                guard.begin(trainer, args, state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                guard.end_step(state, control)

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if args.should_save:  # in the main process
                    guard.write_best()

        trainer.add_callback(GuardCallback())

    def begin(self, trainer: Any, args: Any, state: Any, control: Any) -> None:
        """Before the first step: measure the start, or restore the checkpoint's state."""
        self.restore(state)
        if state.global_step or not self.prompts or not self.run.settings.collapse_guard:
            return
        self.model.train()  # decoding restores the mode that it finds
        numbers = self.measure()  # an adapter that is worse than the start must not replace it
        state.log_history.append({**numbers, "step": 0})
        trainer.callback_handler.on_log(args, state, control, numbers)
        self._judge(0)
        if len(self.prompts) < SMALLEST_FALL and state.is_world_process_zero:
            print(
                f"note: {len(self.prompts)} measured held-out puzzles are too few to see a clear fall, which takes "
                f"{SMALLEST_FALL} lost ones (--eval_puzzles, --holdout_examples)"
            )

    def end_step(self, state: Any, control: Any) -> None:
        """After a step: judge the newest measurement and the log, and stop the training if one shows a collapse."""
        if not self.run.settings.collapse_guard:
            return
        self._judge(state.global_step)
        self._look_at_completions(state)
        if state.global_step >= state.max_steps:
            self.reason = None  # the training is over anyway
        state.stateful_callbacks[STATE] = self.state()
        if self.reason:
            if state.is_world_process_zero:
                print(f"stopped after step {state.global_step}: {self.reason}")
            control.should_training_stop = control.should_log = True
            control.should_save = self.run.settings.save_steps != 0

    def _judge(self, step: int) -> None:
        now, self._newest = self._newest, None
        if now is None:
            return
        # The best has the most solved puzzles, then the most grids, then the most training.
        names = ("solved", "decodable")
        if self.best is None or [sum(now[name]) for name in names] >= [sum(self.best[name]) for name in names]:
            self.best = {"step": step, **now}
            self._weights, self._written = trained_weights(self.model), None
            return
        for name, verb in (("solved", "are solved"), ("decodable", "get a grid as their answer")):
            best = self.best[name]
            if self.reason is None and has_fallen(best, now[name]):
                self.reason = (
                    f"{sum(now[name])} of {len(best)} held-out puzzles {verb}, at the best (step {self.best['step']}) "
                    f"{sum(best)}; the probability of such a fall by chance is {fall_probability(best, now[name]):.2g}"
                )

    def _look_at_completions(self, state: Any) -> None:
        settings = self.run.settings
        groups = settings.logging_steps * settings.samples_per_step / settings.num_generations
        for name, description in CLIMBING.items():
            shares = [line[name] for line in state.log_history if isinstance(line.get(name), (int, float))]
            rise = climb(shares, groups)
            if self.reason is None and rise is not None:
                newest, lowest, lines = rise
                self.reason = f"{description}: {newest:.0%} over the last {lines} log lines, {lowest:.0%} before"

    def state(self) -> dict[str, Any]:
        """The guard's entry in trainer_state.json."""
        return {"best": self.best, "reason": self.reason}

    def restore(self, state: Any) -> None:
        """Restore the state of a checkpoint, and the best weights from their file; a note says if that is missing."""
        stored = (state.stateful_callbacks or {}).get(STATE)
        if not stored or not self.run.settings.collapse_guard:
            return
        self.best, self.reason = stored["best"], stored["reason"]
        if self.best is None:
            return
        step = self.best["step"]
        try:
            self._weights, self._written = read_weights(self._path(step)), step
        except (OSError, ValueError) as error:
            print(f"note: the best adapter, of step {step}, is lost ({error}): the search begins anew")
            self.best = None

    def _path(self, step: int) -> Path:
        return self.run.work / f"best-{step}.safetensors"

    def write_best(self) -> None:
        """Write the best weights before the checkpoint that names them counts as complete; delete unused ones."""
        if self.best is None or not self._weights:
            return
        step = self.best["step"]
        if self._written != step:  # a file of that name may be of an earlier run that was killed
            write_weights(self._weights, self._path(step))
            self._written = step
        used = {self._path(step)}
        for checkpoint in complete_checkpoints(self.run.work, quiet=True):
            stored = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            best = ((stored.get("stateful_callbacks") or {}).get(STATE) or {}).get("best")
            used |= {self._path(best["step"])} if best else set()
        for path in set(self.run.work.glob("best-*.safetensors")) - used:
            path.unlink()

    def keep_best(self, trainer: Any) -> dict[str, Any]:
        """After the training: give the model the best adapter's weights; returns the manifest's entry "policy".

        It has the steps of the weights and of the training, the held-out puzzles and how many of them these weights
        solve (None: not measured), and the reason of a stop (or None).
        """
        last = trainer.state.global_step
        about: dict[str, Any] = {
            "step": last, "last_step": last, "heldout_solved": None, "heldout_puzzles": len(self.prompts),
        }  # fmt: skip
        if self.run.settings.collapse_guard:
            if self.best is None:  # an earlier run has done the training
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


def trained_weights(model: Any) -> dict[str, Any]:
    """Copies of all trainable weights in main memory, by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_weights(model: Any, weights: dict[str, Any]) -> None:
    """Set a model's trainable weights to those of `trained_weights`; raises ValueError if names or shapes differ."""
    import torch

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    different = sorted(trainable.keys() ^ weights.keys())
    different += [name for name, p in trainable.items() if name in weights and p.shape != weights[name].shape]
    if different:
        raise ValueError(f"the best adapter's weights are of another model: {different[0]} differs")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])


def write_weights(weights: dict[str, Any], path: Path) -> None:
    """Write weights as safetensors. A file of that name is always complete."""
    from safetensors.torch import save_file

    write_atomically(path, lambda beside: save_file(weights, str(beside)))


def read_weights(path: Path) -> dict[str, Any]:
    """Read weights that `write_weights` wrote; raises FileNotFoundError, or ValueError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
