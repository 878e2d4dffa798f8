"""Before reinforcement learning: which prompts the model can learn from.

A group of completions that are all right, or all wrong, has no advantage and gives no gradient. So before the training
the model answers each prompt a few times, and prompts that it solves always or never are left out. The result is
written to a file, so that a continued run trains on the same prompts.

Source: DAPO (Yu et al. 2025, arXiv 2503.14476) drops such groups after sampling them, in every step. Here the prompts
are filtered once, because the model changes little in a few hundred steps.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arc.decoding.device_sampling import DeviceSampler
from arc.decoding.greedy import generate_replies
from arc.decoding.rows import Work, halve_on_out_of_memory
from arc.decoding.sampling import sample_replies
from arc.grpo.rewards import judge_components
from arc.grpo.rollouts import RolloutModel
from arc.grpo.settings import PolicyRun, PolicySettings
from arc.puzzles.files import write_atomically
from arc.puzzles.keys import seeded_rng
from arc.puzzles.text import can_become_grid
from arc.runs.artifacts import fingerprint
from arc.runs.processes import is_main, wait_for_everyone
from arc.training.data import StageData

CHUNK = 256  # prompts between two writes of the file: a killed scan repeats at most so many
ROWS = 512  # replies sampled at once; halved where memory is too small


@dataclass(frozen=True)
class Scan:
    """The result of a scan."""

    rows: np.ndarray  # of the first epoch, int64 (prompts,)
    solved: np.ndarray  # exactly right samples of each prompt, int64 (prompts,)
    samples: int  # of each prompt
    seconds: float = 0.0  # 0 if the result was read from the file

    @property
    def learnable(self) -> np.ndarray:
        """Whether each prompt was solved at least once and not always, bool (prompts,)."""
        return (self.solved > 0) & (self.solved < self.samples)

    @property
    def chosen(self) -> np.ndarray:
        """The rows to train on, int64 (rows,): the learnable ones; all, if none is."""
        return self.rows[self.learnable] if self.learnable.any() else self.rows

    def counts(self) -> dict[str, int]:
        """The manifest's entry."""
        return {
            "prompts": len(self.rows),
            "samples": self.samples,
            "never_solved": int((self.solved == 0).sum()),
            "always_solved": int((self.solved == self.samples).sum()),
            "learnable": int(self.learnable.sum()),
        }

    def describe(self) -> str:
        """A line for the log, and a warning if no prompt can be learned from."""
        counts, solved = self.counts(), self.solved.sum() / (self.samples * len(self.rows))
        source = f"in {self.seconds:.1f} s" if self.seconds else "read from the file of an earlier run"
        text = (
            f"scan: {counts['prompts']:,} prompts x {self.samples} samples ({source}), "
            f"{solved:.1%} of the samples exact; left out: {counts['never_solved']:,} never and "
            f"{counts['always_solved']:,} always solved; trained on: {counts['learnable']:,} "
            f"({counts['learnable'] / counts['prompts']:.1%})"
        )
        if self.learnable.any():
            return text
        return (
            f"{text}\nwarning: no prompt was solved sometimes and missed sometimes: all are used, and few groups will "
            "give a gradient. Train stage 2 further, scan more (--scan_prompts, --scan_samples), or raise --temperature"
        )


def scan_prompts(
    model: Any, run: PolicyRun, data: StageData, max_completion_length: int, from_copy: bool = False
) -> Scan | None:
    """Sample replies to as many prompts as training needs, or read the result of an earlier run; prints the counts.

    The prompts are a seeded choice of the first epoch's views. The result is written after every CHUNK prompts to a
    file beside the checkpoints, whose name depends on everything that the result depends on. The peft model has not
    been trained yet, so that it answers as the stage's parent. `from_copy` samples from a plain copy of it, as the
    training will. None with --skip_scan.
    """
    settings = run.settings
    if settings.skip_scan:
        print("scan: skipped; all prompts are used")
        return None
    rows = rows_to_scan(len(data.samples), prompts_of_training(settings), settings.seed)
    made_for = scan_identity(run, data, rows, max_completion_length, from_copy)
    name = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()
    path = run.work / f"scan-{name[:16]}.json"
    if not is_main():
        wait_for_everyone()  # the main process scans and writes, the others read
    solved, seconds = read_scan(path, made_for), 0.0

    def save() -> None:
        prompts = [{"row": int(row), "solved": int(count)} for row, count in zip(rows, solved, strict=False)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"made_for": made_for, "prompts": prompts}) + "\n")

    if len(solved) < len(rows):
        begin = time.perf_counter()
        model.train()  # decoding restores the mode that it finds
        sample = sampler(model, run, data, max_completion_length, from_copy)
        scan_remaining(rows, solved, sample, save)
        seconds = time.perf_counter() - begin
    if is_main():
        wait_for_everyone()
    scan = Scan(rows, np.array(solved, dtype=np.int64), settings.scan_samples, seconds)
    print(scan.describe())
    return scan


def prompts_of_training(settings: PolicySettings) -> int:
    """Prompts to scan: --scan_prompts, or as many as all training steps take."""
    if settings.scan_prompts is not None:
        return settings.scan_prompts
    return settings.max_steps * (settings.samples_per_step // settings.num_generations)


def rows_to_scan(rows: int, count: int, seed: int) -> np.ndarray:
    """A seeded choice of `count` row numbers below `rows` (or all), int64; a larger one begins with the smaller."""
    return seeded_rng(seed, "scan").permutation(rows)[:count].astype(np.int64)


def scan_identity(
    run: PolicyRun, data: StageData, rows: np.ndarray, max_completion_length: int, from_copy: bool
) -> dict[str, Any]:
    """Everything that a scan's result depends on, as JSON holds it."""
    settings, views = run.settings, data.samples.views
    return {
        "model": fingerprint(run.parent),
        "precision": asdict(run.precision),
        "fast_rollouts": from_copy,
        "puzzles": data.split.train.content_hash(),
        "views": [
            *(views.seed, views.tp, views.rt, views.perm, views.keep_background, views.shfl_ex),
            *([] if views.perm_share == 1 else [views.perm_share]),  # scans of earlier versions have no such entry
        ],
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
        "max_seq_length": settings.max_seq_length,
        "max_completion_length": max_completion_length,
        "samples": settings.scan_samples,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }


def scan_remaining(
    rows: np.ndarray, solved: list[int], sample: Callable[[Sequence[int]], list[int]], save: Callable[[], None]
) -> None:
    """Append the results of `sample` to `solved`, in place, until it has one for each row; `save` after each chunk."""
    from tqdm import tqdm

    with tqdm(total=len(rows), initial=len(solved), desc="scan", unit="prompt", disable=None) as bar:
        while len(solved) < len(rows):
            chunk = rows[len(solved) : len(solved) + CHUNK].tolist()
            solved += sample(chunk)
            save()
            bar.update(len(chunk))


def sampler(
    model: Any, run: PolicyRun, data: StageData, max_completion_length: int, from_copy: bool = False
) -> Callable[[Sequence[int]], list[int]]:
    """A function from row numbers to how many of `scan_samples` replies to each are exactly right.

    The result for a row does not depend on the other rows, except where Unsloth's generate draws for a whole batch.
    """
    text_options = {name: data.format[name] for name in ("reply_end", "lines_sep")}
    answer = reply_sampler(model, run, data, max_completion_length, from_copy)

    def sample(rows: Sequence[int]) -> list[int]:
        keys = [row["key"] for row in data.samples.__getitems__(rows)]
        prompts = [row["input_ids"] for row in data.encoder.encode(data.puzzles, keys, reply=False)]
        solved = []
        for key, replies in zip(keys, answer(prompts, rows), strict=True):
            texts = data.tokenizer.batch_decode(replies, skip_special_tokens=False)
            judged = [judge_components(data.puzzles, key, text, **text_options) for text in texts]
            solved.append(sum(components.exact_match == 1.0 for components in judged))
        return solved

    return sample


def reply_sampler(
    model: Any, run: PolicyRun, data: StageData, max_completion_length: int, from_copy: bool
) -> Callable[[Sequence[np.ndarray], Sequence[int]], list[list[np.ndarray]]]:
    """A function from prompts and their row numbers to `scan_samples` replies to each, int64 (tokens,).

    `DeviceSampler` decodes a plain copy, `sample_replies` a model of transformers with the same random numbers.
    Unsloth's model is decoded by its own generate, as in its training.
    """
    settings, tokenizer, engine = run.settings, data.tokenizer, run.precision.engine
    samples, temperature = settings.scan_samples, settings.temperature
    # Not the training's random numbers.
    seed = int(seeded_rng(settings.seed, "scan", "samples").integers(2**31))
    device_sampler: DeviceSampler | None = None
    if from_copy:
        copy = RolloutModel(model, run.precision.torch_dtype).model
        device_sampler = DeviceSampler(
            copy, tokenizer.eos_token_id, max_new_tokens=max_completion_length, temperature=temperature
        )
    work = Work()  # remembers the batch size that fitted

    def hopeless(tokens: list[int]) -> bool:
        return not can_become_grid(tokenizer.decode(tokens, skip_special_tokens=False), data.format["lines_sep"])

    def answer(prompts: Sequence[np.ndarray], rows: Sequence[int]) -> list[list[np.ndarray]]:
        if device_sampler is not None:
            replies = device_sampler.sample(prompts, samples=samples, seed=seed, seeds=rows, batch_size=ROWS)
            return [[reply.tokens for reply in group] for group in replies]
        options: dict[str, Any] = {
            "samples": samples, "temperature": temperature, "work": work, "max_new_tokens": max_completion_length,
            "batch_size": work.batch_size or ROWS,
        }  # fmt: skip
        if engine == "unsloth":
            return generate_samples(model, engine, tokenizer, prompts, seed=seed + int(rows[0]), **options)
        replies = sample_replies(model, engine, tokenizer, prompts, seed=seed, seeds=rows, hopeless=hopeless, **options)
        return [[reply.tokens for reply in group] for group in replies]

    return answer


def generate_samples(
    model: Any, engine: str, tokenizer: Any, prompts: Sequence[np.ndarray], *, max_new_tokens: int, samples: int,
    temperature: float, seed: int, batch_size: int, work: Work | None = None,
) -> list[list[np.ndarray]]:  # fmt: skip
    """Sample replies to each prompt with the model's own `generate`, see `generate_replies`.

    `batch_size` replies are sampled at once, fewer where memory is too small; `work` then stores their number.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]

    def generate(size: int) -> list[np.ndarray]:
        return generate_replies(
            model, engine, tokenizer, repeated, max_new_tokens, size, temperature=temperature, seed=seed
        )

    replies = halve_on_out_of_memory(generate, batch_size, work)
    return [replies[i : i + samples] for i in range(0, len(replies), samples)]


def read_scan(path: Path, made_for: dict[str, Any]) -> list[int]:
    """Read how often each scanned row was solved, in order: empty without a usable file, short after a kill.

    `made_for` is the scan's identity. A note names a file that was changed or cut.
    """
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        solved = [int(entry["solved"]) for entry in content["prompts"]]
        usable = content["made_for"] == json.loads(json.dumps(made_for))
        usable = usable and all(0 <= count <= made_for["samples"] for count in solved)
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        print(f"note: {path} is no scan of these prompts by this model: it is not used, and written anew")
        return []
    return solved
