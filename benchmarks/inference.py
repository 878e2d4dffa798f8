"""Search, greedy decoding and scoring of replies against the plain ways, on the same puzzles in the same run.

    python benchmarks/inference.py --model output/Llama-3.2-1B-Final-merged --dataset_dir dataset

Search: the plain way goes as the public code does: one view at a time, recursive depth-first search on a growing cache,
one token a pass, the best reply of the former views verified in the pass over the prompt (--plain_guess). Ours searches
view 0 of all test inputs together, then all other views with the best reply of view 0 as a guess. Replies and their
probabilities are compared one by one.
Greedy: transformers' `generate` against ours, the same prompts in one batch.
Scoring: every grid found, under every view of its puzzle: one pass a reply against ours.

The limit beside the times is what the device needs for the passes made if it does nothing twice:

    (passes * bytes of the weights + cached tokens seen * bytes of a token in the cache) / bandwidth
    + 2 * weights * tokens of prompts (in scoring: of prompts and replies) / rate of matrix products

Bandwidth (of a large copy, read and written bytes) and rate (of a large product) are measured in the same run. Weights
are those that a pass multiplies by: all but an embedding that is only looked up. Cached tokens seen: each row's once in
each pass over replies.

Random weights answer nothing with a probability of 0.1, so their search ends with the prompts. --peaked imposes replies
on any model: see `impose_replies`. Then only the times, and that both ways agree, mean something.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from arc.decoding.greedy import generate_replies, longest_reply
from arc.decoding.rows import Reply, Work
from arc.decoding.sampling import sample_replies
from arc.decoding.scoring import score_replies
from arc.decoding.search import search_replies
from arc.evaluation.selection import gather_candidates
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.keys import seeded_rng
from arc.puzzles.text import format_options
from arc.puzzles.views import view_keys

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")
# By how much the log probability of a reply may differ between passes of another shape.
ROUNDING = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
BONUS = 16.0  # on the logit of an imposed token: beside it, all others of a cut vocabulary have about 1e-5
BEHIND = 1.5  # how far the second choice of an open place is behind: it gets about 0.2, and some noise of the weights
OPEN_PLACES = 3  # of a reply: together with `BEHIND`, 1 to 4 replies of a view reach 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The plain ways


def plain_search(
    model: Any,
    end: int,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    min_prob: float,
    guess: np.ndarray | None = None,
    work: Work,
) -> list[Reply]:
    """Replies to one prompt of probability `min_prob` or more, by recursive depth-first search on a cache of one row.

    Args:
        model: in evaluation mode, plain transformers.
        end: the end token.
        prompt: token ids (tokens,).
        max_new_tokens: longest reply, end token included.
        min_prob: the least probability.
        guess: a likely reply (tokens,), verified in the pass over the prompt, or None.
        work: counts what is done.

    Source: our own code for what `inference_turbo_dfs` of the ARChitects (2024) does: the guess comes first and is left
    for good where the search leaves it; other branches take one pass a token. Here these are explored in the order of
    their probability, logits are computed at the places needed only, and probabilities in float64.
    """
    import torch
    from transformers import DynamicCache

    bound, cache, replies = math.log(min_prob), DynamicCache(), []
    guessed = [] if guess is None else [int(token) for token in guess if token != end][: max_new_tokens - 1]

    def forward(ids: list[int], kept: int) -> torch.Tensor:
        work.passes += 1
        tokens = torch.tensor([ids], device=model.device)
        return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits[0]

    def follow(path: list[int], logits: torch.Tensor, wanted: list[int], before: float) -> None:
        # logits (1 + wanted, vocabulary): after the path, and after each token of the guess that may come next
        totals = before + torch.log_softmax(logits[0].double(), -1).cpu().numpy()
        children = [token for token in np.argsort(-totals, kind="stable").tolist() if totals[token] >= bound]
        # The guess first: as soon as another branch is taken, what the cache holds of it is gone.
        children.sort(key=lambda token: token != (wanted[0] if wanted else None))
        for token in children:
            if token == end:
                replies.append(Reply(np.array([*path, end], dtype=np.int64), float(totals[token])))
            elif len(path) + 2 > max_new_tokens:
                continue
            elif wanted and token == wanted[0]:
                follow([*path, token], logits[1:], wanted[1:], totals[token])
            else:
                beyond = cache.get_seq_length() - len(prompt) - len(path)
                if beyond:
                    cache.crop(-beyond)
                work.reply_tokens += 1
                follow([*path, token], forward([token], 1), [], totals[token])

    work.prompt_tokens += len(prompt)
    work.reply_tokens += len(guessed)
    with torch.no_grad():
        follow([], forward([*prompt.tolist(), *guessed], 1 + len(guessed)), guessed, 0.0)
    return sorted(replies, key=lambda reply: -reply.log_prob)


def plain_score(model: Any, prompt: np.ndarray, reply: np.ndarray) -> float:
    """Log probability of a reply (tokens,) after a prompt (tokens,), in a pass of its own."""
    import torch

    ids = torch.from_numpy(np.concatenate([prompt, reply]).astype(np.int64)).to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=len(reply)).logits[0]
    return float(torch.log_softmax(logits.double(), -1).gather(-1, ids[-len(reply) :, None]).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Imposed replies


def impose_replies(
    model: Any, prompts: Sequence[np.ndarray], pairs: Sequence[tuple[np.ndarray, np.ndarray]], longest: int
) -> None:
    """Make a model answer prompts as a trained one might, whatever its weights: changes `model.forward` for good.

    After a prompt and the begin of a reply, the logit of the reply's next token gets `BONUS`; at open places a second
    choice gets `BONUS - BEHIND`, and both branches go on with the same reply. Everything else is left to the model,
    whose own logits stay in the sum: with a wrong cache, probabilities would be wrong too.

    The bonus depends on the tokens that a position sees and on nothing else, so that every way of decoding is treated
    alike. How a pass knows them: each token has a number (its own times its position's, both random, 64 bits), kept in
    the cache as the keys of one more layer, which goes wherever the cache goes; the sum of the numbers that a position
    sees, by the mask of the pass, is looked up among the sums of the replies' begins. A few small kernels a pass.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, each (tokens,).
        pairs: for each prompt the reply and the second choices, each (tokens,), end token included; the same token
            where a place is not open.
        longest: tokens that a reply can have.
    """
    import torch

    rng = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # A pass pads rows to the longest draft, so that positions of no meaning reach beyond the longest reply.
    positions = max(map(len, prompts)) + 2 * longest + 64
    of_position, of_token = (
        rng.integers(-(2**63), 2**63, size, dtype=np.int64) | 1 for size in (positions, vocabulary)
    )
    known: list[np.ndarray] = []
    choices: list[np.ndarray] = []
    for prompt, (reply, second) in zip(prompts, pairs, strict=True):
        paths = [reply]
        for place in np.flatnonzero(reply != second):
            paths += [np.concatenate([path[:place], second[place : place + 1], path[place + 1 :]]) for path in paths]
        for path in paths:
            ids = np.concatenate([prompt, path])[:-1]
            sums = np.cumsum(of_position[: len(ids)] * of_token[ids])
            known.append(sums[len(prompt) - 1 :])
            choices.append(np.stack([reply, second], axis=1))
    sums, first = np.unique(np.concatenate(known), return_index=True)
    chosen = np.concatenate(choices)[first].astype(np.int64)
    bonuses = np.where(chosen[:, :1] == chosen[:, 1:], [BONUS, 0.0], [BONUS, BONUS - BEHIND])
    tables = (of_position, of_token, sums, chosen, bonuses.astype(np.float32))
    of_position, of_token, sums, chosen, bonuses = (torch.from_numpy(table).to(model.device) for table in tables)
    plain, layer = model.forward, model.config.num_hidden_layers

    @functools.wraps(plain)  # `generate` asks which arguments there are
    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> Any:
        if position_ids is None:
            before = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)[None]
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        out = plain(input_ids=input_ids, **given, **more)
        numbers = of_position[position_ids] * of_token[input_ids]
        if past_key_values is not None:
            layers = getattr(past_key_values, "layers", None)
            if layers and len(layers) == layer and hasattr(layers[0], "get_seq_length"):
                layers.append(type(layers[0])())  # a cache that `generate` made for the layers of the configuration
            numbers = past_key_values.update(numbers[:, None, :, None], numbers[:, None, :, None], layer)[0][:, 0, :, 0]
        kept = out.logits.shape[1]
        if attention_mask is not None and attention_mask.ndim == 4:
            seen = torch.where(attention_mask[:, 0, -kept:], numbers[:, None], 0).sum(-1)
        else:
            seen = (numbers if attention_mask is None else numbers * attention_mask).cumsum(-1)[:, -kept:]
        at = torch.searchsorted(sums, seen.contiguous()).clamp(max=len(sums) - 1)
        bonus = torch.where((sums[at] == seen)[..., None], bonuses[at], 0.0)
        out.logits = out.logits.float().scatter_add(-1, chosen[at], bonus)
        return out

    model.forward = forward


def reply_with_open_places(tokenizer: Any, key: str, prompt: np.ndarray, reply: np.ndarray) -> tuple[np.ndarray, ...]:
    """A reply (tokens,) and its second choices (tokens,): another colour of the prompt at places drawn by the key."""
    second = reply.copy()
    texts = {token: tokenizer.decode([token]) for token in sorted({*prompt.tolist(), *reply.tolist()})}
    cells = [place for place, token in enumerate(reply.tolist()) if texts[token].isdigit()]
    rng = seeded_rng(0, "open places", key)
    for place in rng.permutation(cells)[:OPEN_PLACES].tolist():
        token = int(reply[place])
        like = [t for t, text in texts.items() if text.isdigit() and len(text) == len(texts[token]) and t != token]
        second[place] = rng.choice(like) if like else token
    return reply, second


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the seconds that it and its kernels take."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    begin = time.perf_counter()
    result = run()
    wait()
    return result, time.perf_counter() - begin


class Device:
    """What a device can do at best, and what a model asks of it.

    Args:
        model: sizes are its own.
        dtype: of the arithmetic.
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        """Measure."""
        import torch

        config, embedding = model.config, model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        unused = 0 if head is embedding else embedding.numel()  # rows are looked up, not multiplied
        self.weights = model.num_parameters() - unused
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        self.weight_bytes = stored - unused * embedding.element_size()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize
        cuda = model.device.type == "cuda"
        source = torch.ones(2**31 if cuda else 2**27, dtype=torch.uint8, device=model.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / min(timed(lambda: target.copy_(source))[1] for _ in range(5))
        side = 8192 if cuda else 1024
        matrix = torch.randn(side, side, device=model.device).to(dtype)
        self.rate = 2 * side**3 / min(timed(lambda: matrix @ matrix)[1] for _ in range(5))

    def limit(self, work: Work, parallel_replies: bool = False) -> float:
        """Seconds that this work needs at least, see the head of this file."""
        read = work.passes * self.weight_bytes + work.seen_tokens * self.token_bytes
        tokens = work.prompt_tokens + (work.reply_tokens if parallel_replies else 0)
        return read / self.bandwidth + 2 * self.weights * tokens / self.rate


def share(limit: float, seconds: float) -> str:
    """How near a time comes to its limit."""
    return f"limit {limit:.3f} s: {limit / seconds:.1%} of it reached"


class Puzzles:
    """Views of test inputs with their prompts, and grids as replies to them.

    Args:
        dataset: puzzles with solutions.
        keys: test inputs.
        tokenizer: the model's.
        views: of each test input.
        max_seq_length: longest prompt; demonstrations are left out to fit.

    Attributes:
        prompts: (test input, view) -> token ids (tokens,).
        names: (test input, view) -> the view's key.
    """

    def __init__(self, dataset: ArcDataset, keys: Sequence[str], tokenizer: Any, views: int, max_seq_length: int):
        """Encode all views."""
        self.dataset, self.keys, self.tokenizer, self.views = dataset, list(keys), tokenizer, views
        self.format = format_options(tokenizer.eos_token)
        self.encoder = SampleEncoder(tokenizer, **self.format)
        names = [name for key in keys for name in view_keys(dataset, key, views)]
        rows = self.encoder.encode(dataset, names, max_tokens=max_seq_length, reply=False)
        places = [(i, view) for i in range(len(self.keys)) for view in range(views)]
        self.prompts = {place: row["input_ids"] for place, row in zip(places, rows, strict=True)}
        self.names = {place: row["key"] for place, row in zip(places, rows, strict=True)}

    def reply(self, place: tuple[int, int], grid: np.ndarray | None = None) -> np.ndarray:
        """A grid of the puzzle, by default its solution, as the reply in a view."""
        name = self.names[place]
        if grid is None:
            puzzle, number = self.dataset.get_base_key_and_reply_num(name)
            grid = self.dataset.solutions[puzzle][number]
        return self.encoder.encode_reply(ArcDataset.transform_array(grid, name.split(".")[1:]))

    def grid(self, place: tuple[int, int], reply: Reply) -> np.ndarray | None:
        """What a reply in a view means as a grid of the puzzle; None: it is no grid."""
        text = self.tokenizer.decode(reply.tokens, skip_special_tokens=False)
        options = {"lines_sep": self.format["lines_sep"], "reply_end": self.format["reply_end"]}
        return self.dataset.decode(text, key=self.names[place], **options)[0]

    def query_as_reply(self, place: tuple[int, int]) -> np.ndarray:
        """The test input as the reply in a view: many outputs are inputs with a few cells changed."""
        puzzle, number = self.dataset.get_base_key_and_reply_num(self.names[place])
        return self.reply(place, self.dataset.challenge[puzzle]["test"][number]["input"])

    def best_grid(self, found: dict[tuple[int, int], list[Reply]], i: int) -> np.ndarray | None:
        """The grid of the most probable reply to any view of test input `i` so far."""
        replies = [(reply.log_prob, place, reply) for place in found if place[0] == i for reply in found[place]]
        for _, place, reply in sorted(replies, key=lambda entry: -entry[0]):
            grid = self.grid(place, reply)
            if grid is not None:
                return grid
        return None


Found = dict[tuple[int, int], list[Reply]]


def search_plainly(model: Any, puzzles: Puzzles, options: dict[str, Any], guess: bool, work: Work) -> Found:
    """All views of all test inputs, one by one."""
    from arc.models.loading import decoding

    found: Found = {}
    with decoding(model, "transformers"):
        for place, prompt in puzzles.prompts.items():
            grid = puzzles.best_grid(found, place[0]) if guess else None
            draft = None if grid is None else puzzles.reply(place, grid)
            end = puzzles.tokenizer.eos_token_id
            found[place] = plain_search(model, end, prompt, guess=draft, work=work, **options)
    return found


def search_together(model: Any, puzzles: Puzzles, options: dict[str, Any], batch_size: int, work: Work) -> Found:
    """View 0 of all test inputs, then all other views; guesses are what view 0 has found, or else the test input."""
    found: Found = {}
    for is_first in (True, False):
        places = [place for place in puzzles.prompts if (place[1] == 0) is is_first]
        best = {} if is_first else {i: puzzles.best_grid(found, i) for i in range(len(puzzles.keys))}
        known = [best.get(place[0]) for place in places]
        guesses = [
            puzzles.query_as_reply(place) if grid is None else puzzles.reply(place, grid)
            for place, grid in zip(places, known, strict=True)
        ]
        prompts = [puzzles.prompts[place] for place in places]
        more = {"guesses": guesses, "batch_size": batch_size, "work": work, **options}
        replies = search_replies(model, "transformers", puzzles.tokenizer, prompts, **more)
        found.update(zip(places, replies, strict=True))
    return found


def compare(found: Found, other: Found, min_prob: float, rounding: float) -> dict[str, Any]:
    """Replies of two searches, one by one.

    Returns:
        How many are in both; the largest difference of their log probabilities; the probabilities of those in one only;
        and how many of these lie further above `min_prob` than rounding can explain: a path is cut where its
        probability falls below, so a reply that only one search has must be that near to it.
    """
    both, largest, only, unexplained = 0, 0.0, ([], []), 0
    for place in found:
        pair = [{tuple(r.tokens.tolist()): r.log_prob for r in search[place]} for search in (found, other)]
        both += len(pair[0].keys() & pair[1].keys())
        largest = max([largest, *(abs(pair[0][t] - pair[1][t]) for t in pair[0].keys() & pair[1].keys())])
        for at in (0, 1):
            alone = [log_prob for tokens, log_prob in pair[at].items() if tokens not in pair[1 - at]]
            only[at].extend(math.exp(log_prob) for log_prob in alone)
            unexplained += sum(log_prob - math.log(min_prob) > rounding for log_prob in alone)
    names = ("in_both", "largest_difference", "only_plain", "only_ours", "unexplained")
    return dict(zip(names, (both, largest, *only, unexplained), strict=True))


def as_row(name: str, seconds: float, work: Work, **more: Any) -> dict[str, Any]:
    """A row of the results."""
    row = {"name": name, "seconds": seconds, **vars(work), **more}
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def measure_search(model: Any, puzzles: Puzzles, warmup: Puzzles, device: Device, args: Any) -> tuple[Found, Any]:
    """The plain search and ours; returns what ours has found, and the results."""
    new_tokens = ArcDataset.max_new_tokens(tokenizer=puzzles.tokenizer, **puzzles.format)
    options = {"max_new_tokens": new_tokens, "min_prob": args.min_prob}
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * new_tokens))  # the plain search goes as deep as a reply
    rows, result = [], {}
    search_together(model, warmup, options, args.batch_size, Work())
    work = Work()
    found, seconds = timed(lambda: search_together(model, puzzles, options, args.batch_size, work))
    count, limit = sum(map(len, found.values())), device.limit(work)
    ours = as_row("search, ours", seconds, work, replies=count, limit_seconds=limit)
    for guess in {"true": [True], "false": [False], "both": [True, False]}[args.plain_guess]:
        search_plainly(model, first_views(warmup, 2), options, guess, Work())
        work = Work()
        plain, plain_seconds = timed(lambda: search_plainly(model, puzzles, options, guess, work))  # noqa: B023 - run at once
        name = f"search, plain, {'guesses' if guess else 'no guess'}"
        plain_count = sum(map(len, plain.values()))
        rows.append(as_row(name, plain_seconds, work, replies=plain_count, speed_up=plain_seconds / seconds))
        agreement = compare(plain, found, args.min_prob, ROUNDING[args.dtype])
        result[name] = agreement
        print(
            f"  ours is {plain_seconds / seconds:.1f} x as fast; {agreement['in_both']} replies in both, log "
            f"probabilities differ by up to {agreement['largest_difference']:.2g}"
        )
        for side in ("only_plain", "only_ours"):
            chances = ", ".join(f"{p:.4f}" for p in agreement[side])
            print(f"  {side.replace('_', ' in ')}: {len(agreement[side])}{': ' + chances if chances else ''}")
    print(f"  ours: {share(limit, seconds)}")
    if not count:
        print(
            "  NO REPLY REACHES min_prob, as with random weights: this was a pass over the prompts and little else. "
            "--peaked imposes replies"
        )
    return found, {"rows": [ours, *rows], "agreement": result}


def measure_greedy(model: Any, puzzles: Puzzles, device: Device, count: int) -> list[dict[str, Any]]:
    """Greedy replies to `count` prompts in one batch: transformers' generate, then ours."""
    places = sorted(puzzles.prompts, key=lambda place: (place[1], place[0]))[:count]
    prompts = [puzzles.prompts[place] for place in places]
    longest = longest_reply(puzzles.dataset, [puzzles.names[place] for place in places], puzzles.tokenizer)
    work, rows = Work(), []

    def theirs(longest: int = longest) -> list[np.ndarray]:
        return generate_replies(model, "transformers", puzzles.tokenizer, prompts, longest, count)

    def ours(longest: int = longest, work: Work | None = None) -> list[np.ndarray]:
        options = {"max_new_tokens": longest, "temperature": 0, "batch_size": count, "work": work}
        found = sample_replies(model, "transformers", puzzles.tokenizer, prompts, **options)
        return [replies[0].tokens for replies in found]

    theirs(8), ours(8)  # warm-up
    generated, plain_seconds = timed(theirs)
    sampled, seconds = timed(lambda: ours(work=work))
    same = float(np.mean([np.array_equal(a, b) for a, b in zip(generated, sampled, strict=True)]))
    limit = device.limit(work)
    theirs_work = Work(max(map(len, generated)), work.prompt_tokens)
    for name, replies, took, made in (
        ("generate", generated, plain_seconds, theirs_work),
        ("ours", sampled, seconds, work),
    ):
        tokens = sum(map(len, replies))
        more = {"prompts": len(prompts), "tokens": tokens, "tokens_per_s": tokens / took, "limit_seconds": limit}
        rows.append(as_row(f"greedy, {name}, {len(prompts)} rows", took, made, **more))
    print(
        f"  ours is {plain_seconds / seconds:.2f} x as fast; {same:.1%} of the replies are identical; "
        f"generate: {share(limit, plain_seconds)}; ours: {share(limit, seconds)}"
    )
    return [{**row, "identical": same} for row in rows]


def measure_scoring(
    model: Any, puzzles: Puzzles, found: Found, device: Device, batch_size: int
) -> list[dict[str, Any]]:
    """Every grid found, under every view of its puzzle; where none was found, the solution."""
    from arc.models.loading import decoding

    prompts, replies = [], []
    for i in range(len(puzzles.keys)):
        views = [[(puzzles.grid((i, v), r), r.log_prob) for r in found[i, v]] for v in range(puzzles.views)]
        grids: list[np.ndarray | None] = [candidate.grid for candidate in gather_candidates(views)]
        for view in range(puzzles.views):
            for grid in grids or [None]:
                prompts.append(puzzles.prompts[i, view])
                replies.append(puzzles.reply((i, view), grid))
    options = {"batch_size": batch_size}
    work, plain_work = Work(), Work(passes=len(replies))
    score_replies(model, "transformers", puzzles.tokenizer, prompts[:64], replies[:64], **options)
    ours, seconds = timed(
        lambda: score_replies(model, "transformers", puzzles.tokenizer, prompts, replies, work=work, **options)
    )
    plain_work.prompt_tokens, plain_work.reply_tokens = sum(map(len, prompts)), sum(map(len, replies))
    with decoding(model, "transformers"):
        plain_score(model, prompts[0], replies[0])
        plain, plain_seconds = timed(
            lambda: [plain_score(model, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        )
    difference = float(np.abs(np.array(ours) - np.array(plain)).max())
    limit = device.limit(work, parallel_replies=True)
    more = {"scores": len(replies), "largest_difference": difference}
    rows = [
        as_row("scoring, plain", plain_seconds, plain_work, **more),
        as_row("scoring, ours", seconds, work, **more, limit_seconds=limit),
    ]
    print(
        f"  ours is {plain_seconds / seconds:.1f} x as fast; log probabilities differ by up to {difference:.2g}; "
        f"ours: {share(limit, seconds)}"
    )
    return rows


def load_puzzles(args: argparse.Namespace, tokenizer: Any) -> tuple[Puzzles, Puzzles]:
    """What is measured, and other puzzles to warm up with."""
    if args.challenges:
        data = ArcDataset.load_from_json(args.challenges).load_solutions(args.solutions)
    else:
        data = ArcDataset.load_from_local_json(args.dataset_dir)
        data = data.holdout(examples=args.holdout_examples, seed=args.holdout_seed).seen
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    too_long = set(encoder.too_long(data, data.keys, args.max_seq_length))
    keys = [key for key in data.keys if key not in too_long]
    if len(keys) < args.puzzles + args.warmup:
        raise ValueError(f"{len(keys)} test inputs fit, expected {args.puzzles} and {args.warmup} to warm up with")
    views = max([args.views, *(-(-rows // args.puzzles) for rows in args.rows)])
    options = (tokenizer, views, args.max_seq_length)
    measured = np.linspace(0, len(keys) - 1, args.puzzles + args.warmup).astype(int).tolist()  # of all tasks
    chosen = [keys[i] for i in measured]
    return Puzzles(data, chosen[args.warmup :], *options), Puzzles(data, chosen[: args.warmup], *options)


def first_views(puzzles: Puzzles, views: int) -> Puzzles:
    """The same test inputs with fewer views."""
    fewer = object.__new__(Puzzles)
    vars(fewer).update(vars(puzzles), views=views)
    fewer.prompts = {place: prompt for place, prompt in puzzles.prompts.items() if place[1] < views}
    return fewer


def main() -> None:
    """Measure, print, write; exits with 1 if two searches differ by more than rounding explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of the pipeline: -merged, -prepared")
    parser.add_argument("--dataset_dir", default="dataset", help="folder of task files; held-out puzzles are taken")
    parser.add_argument("--holdout_examples", type=int, default=64)
    parser.add_argument("--holdout_seed", type=int, default=42)
    parser.add_argument("--challenges", help="instead of --dataset_dir: a challenge file, with --solutions")
    parser.add_argument("--solutions")
    parser.add_argument("--puzzles", type=int, default=8, help="test inputs (8)")
    parser.add_argument("--warmup", type=int, default=4, help="further test inputs to warm up with (4)")
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--min_prob", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=128, help="rows searched at once by ours")
    parser.add_argument("--score_batch_size", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 64, 128], help="batches of greedy decoding")
    parser.add_argument("--plain_guess", choices=("true", "false", "both"), default="true")
    parser.add_argument(
        "--parts", nargs="+", choices=("search", "greedy", "scoring"), default=None, help="default: all"
    )
    parser.add_argument("--dtype", choices=("auto", *ROUNDING), default="auto")
    parser.add_argument("--load_in_4bit", choices=("true", "false"), default="false")
    parser.add_argument("--max_seq_length", type=int, default=1536)
    parser.add_argument("--peaked", action="store_true", help="impose replies, for weights that have learned nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "inference.json")
    args = parser.parse_args()
    if bool(args.challenges) != bool(args.solutions):
        parser.error("--challenges and --solutions go together")
    if min(args.puzzles, args.warmup, args.views, args.batch_size, args.score_batch_size, *args.rows) < 1:
        parser.error("--puzzles, --warmup, --views, --rows and batch sizes are at least 1")
    parts = args.parts or ["search", "greedy", "scoring"]

    import torch

    from arc.models.loading import load_model, resolve_precision
    from arc.runs.artifacts import versions

    precision = resolve_precision("transformers", args.dtype, args.load_in_4bit == "true")
    args.dtype = precision.dtype
    model, tokenizer = load_model(args.model, precision)
    model.eval()
    puzzles, warmup = load_puzzles(args, tokenizer)
    if args.peaked:
        print("--peaked: the answers are imposed: only times, and that the ways agree, mean something")
        every = [(of, place) for of in (puzzles, warmup) for place in of.prompts]
        prompts = [of.prompts[place] for of, place in every]
        solutions = [of.reply(place) for of, place in every]
        names = [of.names[place] for of, place in every]
        parts_of_replies = zip(names, prompts, solutions, strict=True)
        pairs = [reply_with_open_places(tokenizer, *given) for given in parts_of_replies]
        longest = ArcDataset.max_new_tokens(tokenizer=tokenizer, **puzzles.format)
        impose_replies(model, prompts, pairs, longest)
    device = Device(model, precision.torch_dtype)
    cuda = torch.cuda.is_available()
    lengths = [len(prompt) for prompt in puzzles.prompts.values()]
    replies = [len(puzzles.reply(place)) for place in puzzles.prompts]
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "precision": vars(precision),
        "device": vars(device),
        "prompt_tokens": float(np.mean(lengths)),
        "solution_tokens": float(np.mean(replies)),
    }
    print(
        f"{result['machine']}: copies {device.bandwidth / 1e9:,.0f} GB/s, multiplies {device.rate / 1e12:,.1f} TFLOP/s "
        f"in {precision.dtype}; weights {device.weight_bytes / 1e6:,.0f} MB, a token in the cache "
        f"{device.token_bytes / 1e3:,.1f} kB: a step over 128 rows of {np.mean(lengths):.0f} tokens takes at least "
        f"{(device.weight_bytes + 128 * np.mean(lengths) * device.token_bytes) / device.bandwidth * 1e3:.2f} ms\n"
        f"{len(puzzles.keys)} test inputs, {args.views} views, prompts of {np.mean(lengths):.0f} tokens, solutions of "
        f"{np.mean(replies):.0f}\n"
        "limit = (passes * weight bytes + cached tokens seen * their bytes) / bandwidth\n"
        "        + 2 * weights * prompt tokens (in scoring: all tokens) / rate of matrix products"
    )
    viewed, found = first_views(puzzles, args.views), {place: [] for place in puzzles.prompts}

    def write() -> None:  # part by part, so that a run that is stopped has something to show
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if "search" in parts:
        found, result["search"] = measure_search(model, viewed, first_views(warmup, args.views), device, args)
        write()
    if "greedy" in parts:
        result["greedy"] = [row for rows in args.rows for row in measure_greedy(model, puzzles, device, rows)]
        write()
    if "scoring" in parts:
        result["scoring"] = measure_scoring(model, viewed, found, device, args.score_batch_size)
        write()
    unexplained = sum(a["unexplained"] for a in result.get("search", {}).get("agreement", {}).values())
    if unexplained:
        sys.exit(
            f"FAILED: {unexplained} replies found by one search only, further from min_prob than rounding explains"
        )


if __name__ == "__main__":
    main()
