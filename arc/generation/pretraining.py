"""Pretraining of the demo's base on endless generated puzzles: data, training loop and measurement.

`make_base.py --pretrain_steps N` is the command. Every puzzle has a new rule and new examples, in random colours and
orientations. So the loss only falls if the model reads the rule from the demonstrations. A family that is left out
stays new to the model. Puzzles depend on (seed, number of the chunk) alone, not on the number of
processes that draw them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.generation.families import FAMILIES
from arc.generation.programs import PROGRAM, draw_program
from arc.generation.rules import MIN_SIDE, draw_pairs, pick
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.grids import MAX_SIDE
from arc.puzzles.leaks import find_leaks
from arc.puzzles.text import format_options

if TYPE_CHECKING:
    import torch

# Families that the default pretraining leaves out, so that the stages have something to teach. Each is similar to one
# that it has: keep-colour to recolour, symmetrise to mirror-extend, border to crop.
NEW_FAMILIES = ("keep-colour", "symmetrise", "border")
WIDTH_STEP = 32  # rows of a batch are padded to a multiple of it: few shapes, little padding
CHUNK_BATCHES = 32  # a chunk's puzzles are sorted by length; in a large chunk nearly all batches are full
ROW_TOKENS = 200  # about the mean length of a row; decides only the number of puzzles in a chunk
PRETRAINING, MEASURING = 1, 2  # streams of random numbers: training and measurement draw different puzzles
COMPILED_BY = 20  # steps in which the layers are compiled for all shapes; their time does not count
WARMUP = 0.03  # share of the steps (or seconds) in which the rate rises
PADDING, OTHER, REPLY = 0, 1, 2  # what a token belongs to; a reply's end belongs to the reply
PAD_TOKEN = "<|finetune_right_pad_id|>"


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pretraining; make_base.py's flags have the same names and say what they are."""

    pretrain_steps: int = 0
    pretrain_seconds: float = 0.0
    pretrain_families: tuple[str, ...] = tuple(name for name in FAMILIES if name not in NEW_FAMILIES)
    pretrain_programs: float = 0.0
    pretrain_sizes: tuple[int, ...] = (3,)
    pretrain_max_side: int = 5
    pretrain_batch: int = 32768
    pretrain_rate: float = 2e-3
    pretrain_input_weight: float = 0.1
    pretrain_compile: bool = False
    pretrain_avoid: str | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        unknown = [name for name in self.pretrain_families if name not in FAMILIES]
        whole = "a whole number from"
        checks = [
            ("families", not unknown and self.pretrain_families, f"some of {', '.join(FAMILIES)}"),
            ("programs", 0 <= self.pretrain_programs <= 1, "a share from 0 to 1"),
            ("sizes", min(self.pretrain_sizes, default=0) >= 1, "numbers of demonstrations from 1"),
            ("steps", self.pretrain_steps >= 0, f"{whole} 0"),
            ("seconds", 0 <= self.pretrain_seconds < math.inf, "a number from 0"),
            ("max_side", MIN_SIDE <= self.pretrain_max_side <= MAX_SIDE, f"{MIN_SIDE} to {MAX_SIDE}"),
            ("batch", self.pretrain_batch >= 1, f"{whole} 1"),
            ("rate", 0 < self.pretrain_rate < math.inf, "a number above 0"),
            ("input_weight", 0 <= self.pretrain_input_weight <= 1, "a share from 0 to 1"),
        ]
        return [
            f"--pretrain_{name} is {_shown(getattr(self, f'pretrain_{name}'))}: expected {expected}"
            for name, right, expected in checks
            if not right
        ]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Puzzles


def draw_puzzles(
    rng: np.random.Generator,
    families: Sequence[str],
    count: int,
    sizes: Sequence[int],
    max_side: int,
    programs: float = 0.0,
) -> ArcDataset:
    """Draw puzzles, each with a new rule and new examples.

    Args:
        rng: of all draws.
        families: names in FAMILIES, of which each puzzle's family is drawn.
        count: number of puzzles.
        sizes: numbers of demonstrations, of which each puzzle's is drawn.
        max_side: largest side of a grid.
        programs: share of the puzzles whose rule is a program instead (arc/generation/programs.py).

    Returns:
        Puzzles `FAMILY-NUMBER` or `program-NUMBER` with one test each, without augmentation.
    """
    challenge = {}
    for number in range(count):
        name, size = pick(rng, families), pick(rng, sizes)
        if programs and rng.random() < programs:
            name = PROGRAM
        pairs = _pairs(rng, name, size + 1, max_side)
        examples = [{"input": grid.astype(np.uint8), "output": solved.astype(np.uint8)} for grid, solved in pairs]
        challenge[f"{name}-{number:05d}"] = {"train": examples[:-1], "test": examples[-1:]}
    return ArcDataset(challenge, is_orig=True)


def _pairs(rng: np.random.Generator, name: str, count: int, max_side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    if name != PROGRAM:
        return draw_pairs(FAMILIES[name](rng, max_side), rng, count)
    return draw_program(rng, count, max_side)[1]


class Chunks:
    """Batches of fresh puzzles, a chunk at a time: a map-style dataset for torch's DataLoader.

    Rows of about one length share a batch. Its width is a multiple of WIDTH_STEP and its rows are as many as
    `pretrain_batch` tokens hold, so that there are few different shapes.

    Args:
        settings: what is drawn, and how large a batch is.
        encoder: of the cut vocabulary.
        kept: the id in the whole vocabulary of each token of the cut one.
    """

    def __init__(self, settings: Pretraining, encoder: SampleEncoder, kept: Sequence[int]):
        self.settings, self.encoder, self.kept = settings, encoder, np.asarray(kept, dtype=np.int32)
        self.avoid = None
        if settings.pretrain_avoid is not None:
            self.avoid = ArcDataset.load_from_local_json(settings.pretrain_avoid, sizes=settings.pretrain_sizes)
        self.puzzles = max(1, CHUNK_BATCHES * settings.pretrain_batch // ROW_TOKENS)
        if settings.pretrain_programs:  # each takes milliseconds, and the first batch waits for a whole chunk
            self.puzzles = -(-self.puzzles // 4)

    def __len__(self) -> int:
        """Number of chunks: enough even if each held one batch."""
        return self.settings.pretrain_steps

    def __getitem__(self, chunk: int) -> dict[str, Any]:
        """One chunk.

        Returns:
            `batches`: int32 token ids (rows, tokens); uint8 PADDING, OTHER or REPLY of the same shape; the number of
            tokens that are no padding. `puzzles` and `avoided`: numbers of puzzles in the batches, and left out.
        """
        settings = self.settings
        rng = np.random.default_rng([settings.seed, PRETRAINING, chunk])
        families, sizes = settings.pretrain_families, settings.pretrain_sizes
        ds = draw_puzzles(rng, families, self.puzzles, sizes, settings.pretrain_max_side, settings.pretrain_programs)
        avoided: set[str] = set()
        if self.avoid is not None:
            avoided = {name for names in find_leaks(self.avoid, ds).puzzles.values() for name in names}
            ds = ds.change_keys(key for key in ds.keys if ds.get_base_key(key) not in avoided)
        views = ds.views(int(rng.integers(2**62)), tp=True, rt=True, perm=True)
        rows = self.encoder.encode(ds, views.keys(np.zeros(len(ds.keys), dtype=int), np.arange(len(ds.keys))))
        batches = self._batches(rows)
        return {
            "batches": [batches[i] for i in rng.permutation(len(batches))],
            "puzzles": len(rows),
            "avoided": len(avoided),
        }

    def _batches(self, rows: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray, int]]:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        widths = -(-np.array([len(row["input_ids"]) for row in rows]) // WIDTH_STEP) * WIDTH_STEP
        batches, begin, settings = [], 0, self.settings
        for width in sorted(set(widths.tolist())):
            end, size = int(np.searchsorted(widths, width, side="right")), max(1, settings.pretrain_batch // width)
            last = end == len(rows)
            while end - begin >= size or (last and begin < end):  # what fills no batch is padded to the next width
                batch = rows[begin : min(begin + size, end)]
                ids = np.zeros((size, width), dtype=np.int32)
                roles = np.full((size, width), PADDING, dtype=np.uint8)
                for place, row in enumerate(batch):
                    length = len(row["input_ids"])
                    ids[place, :length] = self.kept[row["input_ids"]]
                    roles[place, :length] = OTHER
                    for first, after in row["reply_spans"]:
                        roles[place, first:after] = REPLY
                used = sum(len(row["input_ids"]) for row in batch)
                batches.append((ids, roles, used))  # no tensors: a process would need a file for each
                begin += len(batch)
        return batches


def _only(items: list[Any]) -> Any:
    return items[0]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def encoder_of(tokenizer: Any) -> tuple[SampleEncoder, list[int]]:
    """An encoder of the cut vocabulary, one token per cell, and the whole vocabulary's id of each token."""
    from arc.models.vocabulary import cut_tokenizer

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = PAD_TOKEN
    cut, kept = cut_tokenizer(padded)
    return SampleEncoder(cut, **format_options(tokenizer.eos_token)), kept


def rate_at(progress: float, peak: float) -> float:
    """The learning rate: a linear rise, then a half cosine to 0; `progress` from 0 to 1."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def pretrain(
    model: Any, tokenizer: Any, settings: Pretraining, workers: int = 0, measure: int = 0, measure_steps: int = 0
) -> dict[str, Any]:
    """Train the model's weights in place, in float32 (on CUDA with arithmetic in bfloat16).

    Only tokens of single characters occur, so the model stays the same when the pipeline cuts the vocabulary. On a CPU
    the same settings give the same weights, unless seconds are limited.

    Args:
        model: a causal language model; stays on the device that it was trained on.
        tokenizer: the whole vocabulary.
        settings: see make_base.py.
        workers: processes that draw puzzles ahead; 0: none.
        measure: puzzles of each family to measure on, every `measure_steps` steps.
        measure_steps: 0: never.

    Returns:
        What was done, for make_base.json.

    Raises:
        ValueError: the loss became NaN or infinite.
    """
    import torch
    from torch.utils.data import DataLoader

    encoder, kept = encoder_of(tokenizer)
    chunks = Chunks(settings, encoder, kept)
    cuda = torch.cuda.is_available()
    loader = DataLoader(
        chunks, batch_size=1, collate_fn=_only, num_workers=workers, prefetch_factor=2 if workers else None
    )
    model.to(device="cuda" if cuda else "cpu", dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.pretrain_rate, betas=(0.9, 0.95), fused=cuda)
    if cuda:
        torch.set_float32_matmul_precision("high")
    if settings.pretrain_compile:
        for layer in model.model.layers:  # one layer's code serves all of them, and any number of rows and tokens
            layer.compile(dynamic=True)
    log = _Log()
    compiling = COMPILED_BY if settings.pretrain_compile else 0
    for ids, roles, used in log.batches(loader):
        if compiling and log.step == compiling:
            if cuda:
                torch.cuda.synchronize()
            compiling, log.paused = 0, time.monotonic() - log.begin
        progress = log.step / settings.pretrain_steps
        if settings.pretrain_seconds:
            progress = max(progress, (0.0 if compiling else log.seconds) / settings.pretrain_seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress + 0.5 / settings.pretrain_steps, settings.pretrain_rate)
        log.tokens += used
        loss, reply_loss = _losses(model, ids, roles, settings.pretrain_input_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.losses.append(reply_loss)
        log.step += 1
        if time.monotonic() - log.printed > 10 or len(log.losses) == 1000:
            log.print(optimizer.param_groups[0]["lr"])
        if measure_steps and log.step % measure_steps == 0 and log.step < settings.pretrain_steps:
            started = time.monotonic()
            print_measured(solved_by_family(model, tokenizer, settings, measure), settings)
            model.train()
            log.paused += time.monotonic() - started
            log.printed += time.monotonic() - started
    if log.losses:
        log.print(optimizer.param_groups[0]["lr"])
    return {
        "new_families": [name for name in FAMILIES if name not in settings.pretrain_families],
        "steps": log.step,
        "tokens": log.tokens,
        "puzzles": log.puzzles,
        "avoided": log.avoided,
        "seconds": round(log.seconds, 3),
        "loss_of_replies": round(log.loss, 4),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }


def _losses(
    model: Any, batch_ids: np.ndarray, batch_roles: np.ndarray, input_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # The loss to minimise, and the mean loss of the replies' tokens.
    import torch

    cuda = model.device.type == "cuda"

    def send(values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        # Without pinned memory the host would wait for the last step.
        return tensor.pin_memory().to(model.device, non_blocking=True) if cuda else tensor

    ids, roles = send(batch_ids).long(), send(batch_roles)
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        logits = model(input_ids=ids, use_cache=False).logits
    # Position t predicts token t + 1. The last one predicts nothing; leaving it in costs less than cutting it off.
    targets, roles = (tensor.roll(-1, dims=1).flatten() for tensor in (ids, roles))
    roles[ids.shape[1] - 1 :: ids.shape[1]] = PADDING
    replies = roles == REPLY
    weights = replies + input_weight * (roles == OTHER)
    token_losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    loss = (token_losses * weights).sum() / weights.sum()
    return loss, ((token_losses * replies).sum() / replies.sum()).detach()


class _Log:
    """What a pretraining has done so far, and the lines that say so."""

    def __init__(self) -> None:
        self.step = self.tokens = self.puzzles = self.avoided = 0
        self.losses: list[torch.Tensor] = []  # since the last line; fetched together, so that the host runs ahead
        self.loss = math.nan
        self.begin = self.printed = time.monotonic()
        self.paused = 0.0  # seconds of measurements and of compiling
        self.printed_tokens = 0

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return time.monotonic() - self.begin - self.paused

    def batches(self, chunks: Iterable[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """The batches of all chunks, whose puzzles are counted."""
        for chunk in chunks:
            self.puzzles, self.avoided = self.puzzles + chunk["puzzles"], self.avoided + chunk["avoided"]
            yield from chunk["batches"]

    def print(self, rate: float) -> None:
        """Print a line.

        Raises:
            ValueError: the loss is NaN or infinite.
        """
        self.loss = sum(self.losses[1:], self.losses[0]).item() / len(self.losses)
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss is {self.loss} near step {self.step}: lower --pretrain_rate")
        now = time.monotonic()
        print(
            f"step {self.step:6,}  loss of replies {self.loss:.4f}  rate {rate:.2e}  {self.seconds:5.0f} s  "
            f"{(self.tokens - self.printed_tokens) / (now - self.printed):9,.0f} tokens/s",
            flush=True,
        )
        self.losses, self.printed, self.printed_tokens = [], now, self.tokens


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def solved_by_family(
    model: Any, tokenizer: Any, settings: Pretraining, count: int, families: Sequence[str] | None = None
) -> dict[str, float]:
    """Exact match of greedy replies to new puzzles, by family.

    Args:
        model: of the whole vocabulary; switched to evaluation.
        tokenizer: the whole vocabulary.
        settings: sizes of puzzles, and the seed.
        count: puzzles of each family.
        families: which; PROGRAM stands for programs. Default: all, and programs if there were any in the training.

    Returns:
        Share of the puzzles solved, by family.
    """
    import torch

    from arc.decoding.greedy import exact_match

    encoder, kept = encoder_of(tokenizer)
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = PAD_TOKEN
    solved = {}
    if families is None:
        families = (*FAMILIES, PROGRAM) if settings.pretrain_programs else tuple(FAMILIES)
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        for number, name in enumerate((*FAMILIES, PROGRAM)):
            if name not in families:
                continue
            rng = np.random.default_rng([settings.seed, MEASURING, number])
            ds = draw_puzzles(
                rng, [name], count, settings.pretrain_sizes, settings.pretrain_max_side, float(name == PROGRAM)
            )
            views = ds.views(settings.seed, tp=True, rt=True, perm=True)
            keys = views.keys(np.zeros(count, dtype=int), np.arange(count))
            prompts = encoder.encode(ds, keys, reply=False)
            prompts = [{"key": row["key"], "input_ids": np.asarray(kept)[row["input_ids"]]} for row in prompts]
            scores = exact_match(model, "transformers", padded, ds, prompts, batch_size=128)
            solved[name] = scores["eval_exact_match"]
    return solved


def print_measured(solved: dict[str, float], settings: Pretraining) -> None:
    """Print the shares of `solved_by_family`; families that are new to the model are marked."""
    known = {*(settings.pretrain_families if settings.pretrain_programs < 1 else [])}
    known |= {PROGRAM} if settings.pretrain_programs else set()
    new = [name for name in solved if name not in known]
    line = "  ".join(f"{name}{'*' if name in new else ''} {share:.0%}" for name, share in solved.items())
    summary = []
    for title, names in (("trained on", [name for name in solved if name not in new]), ("new (*)", new)):
        if names:
            summary.append(f"{title} {np.mean([solved[name] for name in names]):.1%}")
    print(f"  solved: {', '.join(summary)}\n  {line}", flush=True)
