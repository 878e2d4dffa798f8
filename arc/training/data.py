"""The rows of a stage: what is trained on and what is held out, as tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from arc.models.prepared_base import config_token_ids
from arc.models.vocabulary import cut_tokenizer, load_tokenizer
from arc.puzzles.dataset import ArcDataset, Holdout
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.splits import load_split, tasks_in_turn, with_solutions
from arc.puzzles.text import format_options
from arc.runs.settings import RunSettings
from arc.training.stage import StageContext


@dataclass
class StageData:
    """Rows of a stage: what is trained on, what is held out, and how rows become tokens."""

    split: Holdout
    samples: TrainingSamples
    encoder: SampleEncoder
    tokenizer: Any
    heldout: ArcDataset

    @property
    def format(self) -> dict[str, str]:
        """The text format's options."""
        return format_options(self.tokenizer.eos_token)

    @property
    def puzzles(self) -> ArcDataset:
        """What is trained on: those of `split.train` that fit."""
        return self.samples.puzzles

    def steps_per_epoch(self, settings: RunSettings) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.samples) / settings.samples_per_step)

    def steps(self, settings: RunSettings) -> int:
        """Optimizer steps of the whole training."""
        if settings.max_steps > 0:
            return settings.max_steps
        return math.ceil(self.steps_per_epoch(settings) * settings.num_train_epochs)

    def prompts(self, count: int, max_tokens: int) -> list[dict[str, Any]]:
        """Up to `count` held-out rows that end where the reply begins, as the encoder gives them."""
        return self.encoder.encode(self.heldout, self.heldout.keys[:count], max_tokens=max_tokens, reply=False)

    def heldout_rows(self, max_tokens: int) -> list[dict[str, Any]]:
        """All held-out rows with their replies."""
        return self.encoder.encode(self.heldout, self.heldout.keys, max_tokens=max_tokens)


def stage_tokenizer(run: StageContext[RunSettings]) -> Any:
    """The tokenizer of a stage: its parent's, cut as the prepared base's will be where that is not made yet."""
    tokenizer = load_tokenizer(run.parent)
    if run.to_prepare is not None and not run.settings.full_vocab:
        from transformers import AutoConfig

        tokenizer, _ = cut_tokenizer(
            tokenizer, config_token_ids(AutoConfig.from_pretrained(str(run.parent), trust_remote_code=False))
        )
    return tokenizer


def load_data(run: StageContext[RunSettings], solved_only: bool = False) -> StageData:
    """Load and split the data and make the rows that are trained on. What is left out is counted and printed.

    Puzzles without solutions are trained on by their demonstrations, unless `solved_only`. Raises ValueError or
    FileNotFoundError for bad data, or if nothing fits `max_seq_length`.
    """
    settings, tokenizer = run.settings, stage_tokenizer(run)
    split = load_split(settings)
    if solved_only:
        split = split._replace(train=with_solutions(split.train, "to train on"))
        if not len(split.train.keys):
            raise ValueError(f"{settings.dataset_dir}: no puzzle to train on has the outputs of its tests")
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    symmetries: dict[str, Any] = {"all": "all", "true": True, "false": False}
    samples = TrainingSamples(
        split.train, encoder, settings.max_seq_length, seed=settings.seed, tp=symmetries[settings.tp.lower()],
        rt=symmetries[settings.rt.lower()], perm=settings.perm, keep_background=settings.keep_background,
        shfl_ex=settings.shfl_ex, perm_share=settings.perm_share,
    )  # fmt: skip
    if samples.dropped:
        print(
            f"left out: {len(samples.dropped):,} puzzles that do not fit --max_seq_length {settings.max_seq_length} "
            f"with one demonstration ({', '.join(samples.dropped[:3])}{', ...' if len(samples.dropped) > 3 else ''})"
        )
    if len(samples) == 0:
        raise ValueError(f"no puzzle fits --max_seq_length {settings.max_seq_length}: raise it, or lower --sizes")
    heldout = _measured_on(split, encoder, settings)
    return StageData(split, samples, encoder, tokenizer, heldout)


def fitting(heldout: ArcDataset, encoder: SampleEncoder, max_tokens: int) -> ArcDataset:
    """The held-out puzzles that have solutions and fit the longest row; the others are counted and printed."""
    heldout = with_solutions(heldout, "held out")
    long = set(encoder.too_long(heldout, heldout.keys, max_tokens, turned=False))
    if not long:
        return heldout
    print(f"held out: {len(long)} of {len(heldout.keys)} puzzles do not fit --max_seq_length and are not measured")
    return heldout.change_keys([key for key in heldout.keys if key not in long])


def heldout_puzzles(settings: RunSettings, tokenizer: Any) -> tuple[ArcDataset, SampleEncoder]:
    """What a stage with these settings measures on: new puzzles of trained tasks, else those of held-out tasks."""
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    split = load_split(replace(settings, extra_dataset_dirs=[]), quiet=True)  # of what is held out they change nothing
    return _measured_on(split, encoder, settings), encoder


def _measured_on(split: Holdout, encoder: SampleEncoder, settings: RunSettings) -> ArcDataset:
    # New puzzles of trained tasks tell whether training works; whole held-out tasks are kept for the evaluation.
    heldout = split.seen if len(split.seen.keys) else split.unseen
    return tasks_in_turn(fitting(heldout, encoder, settings.max_seq_length), settings.holdout_seed)
