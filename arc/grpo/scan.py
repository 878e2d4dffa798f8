"""Before reinforcement learning: which prompts can be learned from at all.

A group of completions that are all right, or all wrong, has no advantage to learn from. So the model that training
starts from answers each prompt a few times first, and prompts that it always or never solves are set aside. With as
many samples as a group has completions, a prompt is kept just as probably as its group would carry signal in the
training. What was found is kept in a file, so that a run that continues has the same prompts.

Source: DAPO (Yu et al. 2025, arXiv 2503.14476) drops such groups after sampling them, in every step; here they are
found once, beforehand, because the model changes little in a few hundred steps.
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
from arc.puzzles.keys import seeded_rng
from arc.puzzles.text import can_become_grid
from arc.runs.artifacts import fingerprint
from arc.runs.files import flush
from arc.training.data import StageData
from arc.training.run import StageRun

CHUNK = 256  # prompts between two writes of the file: what a killed scan has to repeat
ROWS = 512  # replies sampled at once; halved where memory does not suffice


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        rows: rows of the first epoch's samples that were scanned, int64 (prompts,).
        solved: how many of the samples of each are exactly right, int64 (prompts,).
        samples: of each prompt.
        seconds: that it took; 0 if it was found in the file.
    """

    rows: np.ndarray
    solved: np.ndarray
    samples: int
    seconds: float = 0.0

    @property
    def learnable(self) -> np.ndarray:
        """Whether each prompt was solved at least once and not always, bool (prompts,)."""
        return (self.solved > 0) & (self.solved < self.samples)

    @property
    def chosen(self) -> np.ndarray:
        """The rows to train on, int64 (rows,): the learnable ones; all, if none is."""
        return self.rows[self.learnable] if self.learnable.any() else self.rows

    def counts(self) -> dict[str, int]:
        """What goes into the manifest: prompts, samples of each, and how many of them were never or always solved."""
        return {
            "prompts": len(self.rows),
            "samples": self.samples,
            "never_solved": int((self.solved == 0).sum()),
            "always_solved": int((self.solved == self.samples).sum()),
            "learnable": int(self.learnable.sum()),
        }

    def describe(self) -> str:
        """A line or two for the log."""
        found = self.counts()
        how = f"in {self.seconds:.1f} s" if self.seconds else "found in the file of an earlier run"
        text = (
            f"scan: {found['prompts']:,} prompts x {self.samples} samples ({how}), "
            f"{self.solved.sum() / (self.samples * len(self.rows)):.1%} of the samples exact; set aside: "
            f"{found['never_solved']:,} never and {found['always_solved']:,} always solved; trained on: "
            f"{found['learnable']:,} ({found['learnable'] / found['prompts']:.1%})"
        )
        if not self.learnable.any():
            return (
                f"{text}\nwarning: no prompt was solved sometimes and missed sometimes: all are used, and groups will "
                "carry little signal. Train stage 2 further, scan more (--scan_prompts, --scan_samples), or raise "
                "--temperature"
            )
        return text


def scan_prompts(
    model: Any, run: StageRun, data: StageData, max_completion_length: int, from_copy: bool = False
) -> Scan | None:
    """Sample replies to as many prompts as training needs, or take what an earlier run found; prints the counts.

    Which prompts are scanned is a seeded choice of the first epoch's views, all puzzles and symmetries alike: of
    27,000 puzzles in 8 symmetries, training takes a thousand. What was scanned is written to the stage's folder of
    checkpoints after every CHUNK prompts, under a name that depends on all that the result depends on.

    Args:
        model: the peft model before its first training step: LoRA adds nothing yet, so that it answers as the stage's
            parent does. It is switched to decoding and back.
        run: settings (scan_samples, scan_prompts, skip_scan, temperature, seed), precision and folders.
        data: the prompts.
        max_completion_length: tokens of the longest reply.
        from_copy: sample from a plain copy of the model, as the training does then.

    Returns:
        What was found; None with --skip_scan.
    """
    from accelerate import PartialState

    settings = run.settings
    if settings.skip_scan:
        print("scan: skipped; all prompts are used")
        return None
    rows = rows_to_scan(len(data.samples), prompts_of_training(settings), settings.seed)
    made_for = scan_identity(run, data, rows, max_completion_length, from_copy)
    name = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()
    path = run.work / f"scan-{name[:16]}.json"
    # Of several processes one scans and writes; the others wait for it and read.
    with PartialState().main_process_first():
        solved, begin = read_scan(path, made_for), time.perf_counter()
        done = len(solved)
        if done < len(rows):
            model.train()  # so that decoding hands it back ready for training, whatever it was before
            sample = sampler(model, run, data, max_completion_length, from_copy)
            _scan_the_rest(rows, solved, sample, lambda: write_scan(path, made_for, rows, solved))
        seconds = time.perf_counter() - begin if done < len(rows) else 0.0
    scan = Scan(rows, np.array(solved, dtype=np.int64), settings.scan_samples, seconds)
    if PartialState().is_main_process:
        print(scan.describe())
    return scan


def prompts_of_training(settings: Any) -> int:
    """Prompts to scan: those asked for, else as many as all steps of the training take."""
    if settings.scan_prompts is not None:
        return settings.scan_prompts
    return settings.max_steps * (settings.samples_per_step // settings.num_generations)


def rows_to_scan(rows: int, count: int, seed: int) -> np.ndarray:
    """A seeded choice of `count` of so many rows (all, if there are fewer), int64; a larger one begins alike."""
    return seeded_rng(seed, "scan").permutation(rows)[:count].astype(np.int64)


def scan_identity(
    run: StageRun, data: StageData, rows: np.ndarray, max_completion_length: int, from_copy: bool
) -> dict[str, Any]:
    """All that a scan's result depends on, as JSON holds it."""
    settings = run.settings
    views = data.samples.views
    return {
        "model": fingerprint(run.parent),
        "precision": asdict(run.precision),
        "fast_rollouts": from_copy,
        "puzzles": data.split.train.content_hash(),
        "views": [
            *(views.seed, views.tp, views.rt, views.perm, views.keep_background, views.shfl_ex),
            *([] if views.perm_share == 1 else [views.perm_share]),  # as in scans from before there was a choice
        ],
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
        "max_seq_length": settings.max_seq_length,
        "max_completion_length": max_completion_length,
        "samples": settings.scan_samples,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }


def _scan_the_rest(
    rows: np.ndarray,
    solved: list[int],
    sample: Callable[[Sequence[int]], list[int]],
    save: Callable[[], None],
) -> None:
    # Appends to `solved` until there is a number for each row.
    from tqdm import tqdm

    with tqdm(total=len(rows), initial=len(solved), desc="scan", unit="prompt", disable=None) as bar:
        while len(solved) < len(rows):
            chunk = rows[len(solved) : len(solved) + CHUNK].tolist()
            solved += sample(chunk)
            save()
            bar.update(len(chunk))


def sampler(
    model: Any, run: StageRun, data: StageData, max_completion_length: int, from_copy: bool = False
) -> Callable[[Sequence[int]], list[int]]:
    """A function that samples replies to rows of the first epoch and counts the exact ones.

    transformers' models are decoded by search_tools.sample_replies, in which each sample has random numbers of its own,
    Unsloth's by their own generate, as in its training. Of either a plain copy may be made, which
    sampling_tools.DeviceSampler decodes, with the same random numbers as the former.

    Args:
        model, run, data, max_completion_length, from_copy: see `scan_prompts`.

    Returns:
        Given numbers of rows, how many of `scan_samples` replies to each are exactly right. The result for a row does
        not depend on the other rows, but where Unsloth's generate draws for a whole batch.
    """
    settings, tokenizer = run.settings, data.tokenizer
    options = {name: data.format[name] for name in ("reply_end", "lines_sep")}
    seed = int(seeded_rng(settings.seed, "scan", "samples").integers(2**31))  # other draws than those of the training
    engine, work = run.precision.engine, Work()
    if from_copy:
        from arc.grpo.rollouts import RolloutModel

        copy = RolloutModel(model, run.precision.torch_dtype).model
        fast = DeviceSampler(
            copy, tokenizer.eos_token_id, max_new_tokens=max_completion_length, temperature=settings.temperature
        )

    def hopeless(tokens: list[int]) -> bool:
        return not can_become_grid(tokenizer.decode(tokens, skip_special_tokens=False), options["lines_sep"])

    def answer(prompts: Sequence[np.ndarray], rows: Sequence[int]) -> list[list[np.ndarray]]:
        samples = settings.scan_samples
        if from_copy:
            found = fast.sample(prompts, samples=samples, seed=seed, seeds=rows, batch_size=ROWS)
            return [[reply.tokens for reply in of_prompt] for of_prompt in found]
        how = {"samples": samples, "temperature": settings.temperature, "work": work}
        how |= {"max_new_tokens": max_completion_length, "batch_size": work.batch_size or ROWS}
        if engine == "unsloth":
            return generate_samples(model, engine, tokenizer, prompts, seed=seed + int(rows[0]), **how)
        found = sample_replies(model, engine, tokenizer, prompts, seed=seed, seeds=rows, hopeless=hopeless, **how)
        return [[reply.tokens for reply in of_prompt] for of_prompt in found]

    def sample(rows: Sequence[int]) -> list[int]:
        keys = [row["key"] for row in data.samples.__getitems__(rows)]
        prompts = [row["input_ids"] for row in data.encoder.encode(data.puzzles, keys, reply=False)]
        replies = answer(prompts, rows)
        solved = []
        for key, of_prompt in zip(keys, replies, strict=True):
            texts = tokenizer.batch_decode(of_prompt, skip_special_tokens=False)
            judged = [judge_components(data.puzzles, key, text, **options) for text in texts]
            solved.append(sum(components.exact_match == 1.0 for components in judged))
        return solved

    return sample


def generate_samples(
    model: Any,
    engine: str,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    samples: int,
    temperature: float,
    seed: int,
    batch_size: int,
    work: Work | None = None,
) -> list[list[np.ndarray]]:
    """Sampled replies to each prompt by the model's own `generate`, with as many rows at once as memory allows.

    Args:
        model, engine, tokenizer, prompts, max_new_tokens, temperature, seed: see `inference_tools.generate_replies`.
        samples: replies to each prompt.
        batch_size: replies sampled at once, to begin with.
        work: told how many fitted, where memory ran out.

    Returns:
        For each prompt its replies, token ids (tokens,) each.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]

    def run(size: int) -> list[np.ndarray]:
        return generate_replies(
            model, engine, tokenizer, repeated, max_new_tokens, size, temperature=temperature, seed=seed
        )

    replies = halve_on_out_of_memory(run, batch_size, work)
    return [replies[i : i + samples] for i in range(0, len(replies), samples)]


# ---------------------------------------------------------------------------------------------------------------------
# The file


def read_scan(path: Path, made_for: dict[str, Any]) -> list[int]:
    """What a file holds of a scan: for each row, in order, how often it was solved; empty if there is none that fits.

    A file that was changed or cut is named and not used.
    """
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        solved = [int(entry["solved"]) for entry in content["prompts"]]
        whole = content["made_for"] == json.loads(json.dumps(made_for))
        whole = whole and all(0 <= count <= made_for["samples"] for count in solved)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        print(f"note: {path} is no scan of these prompts by this model: it is not used, and written anew")
        return []
    return solved


def write_scan(path: Path, made_for: dict[str, Any], rows: np.ndarray, solved: Sequence[int]) -> None:
    """Write what was found so far, at once: a reader never sees half of it."""
    prompts = [{"row": int(row), "solved": int(count)} for row, count in zip(rows, solved, strict=False)]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps({"made_for": made_for, "prompts": prompts}) + "\n", encoding="utf-8")
    flush(beside)
    beside.replace(path)
