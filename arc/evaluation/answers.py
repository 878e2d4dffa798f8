"""What a model answers: which model it is, its replies to the views of a puzzle, and the candidates that they make.

Replies are kept in a cache on the disk, so that an evaluation that was killed goes on where it was, and one that asks
for more views computes only those.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diskcache
import numpy as np

from arc.decoding.rows import Reply, Work
from arc.decoding.sampling import sample_replies
from arc.decoding.scoring import score_replies
from arc.decoding.search import search_replies
from arc.evaluation.result_cache import UntrustedCacheError
from arc.evaluation.selection import Candidate, gather_candidates
from arc.models.loading import Precision, load_model, resolve_precision
from arc.models.lora import load_adapter
from arc.models.manifests import read_manifest
from arc.models.prepared_base import check_base
from arc.models.vocabulary import load_tokenizer
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.grids import MAX_SIDE
from arc.puzzles.text import can_become_grid, format_options
from arc.puzzles.views import view_keys
from arc.runs.artifacts import find_damage, fingerprint
from arc.runs.settings import user_errors

CHUNK = 8  # batches of views that are worked on together: what is left at their end does not fill a batch
LONGEST_NAME = 180  # bytes of a model's name: it is part of files' names, which end at 255
RESERVED = (
    "puzzle",
    "train",
    "input",
    "solution",
    "leaked",
    "seen_test",
)  # names in an entry of results.json that are no models


# ---------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class EvaluatedModel:
    """A model as it is evaluated.

    Args:
        name: its column's.
        path: folder or hub name of the model, or of an adapter's base.
        adapter: folder of the adapter on it, if any.
        precision: how the model is loaded.
        identity: tells it from any other by its contents and the way it is loaded.
    """

    name: str
    path: str
    adapter: Path | None
    precision: Precision
    identity: str


def find_models(
    models: Sequence[str], names: Sequence[str] = (), dtype: str = "auto", load_in_4bit: bool | None = None
) -> list[EvaluatedModel]:
    """Look at the models, without loading one.

    Args:
        models: folders of models or adapters, or hub names. An adapter goes onto the base that its adapter_config
            names.
        names: of the columns; none: the folders' own, with the folders above them where two are alike.
        dtype: bfloat16, float16, float32, or auto: what this machine has.
        load_in_4bit: quantise; None: adapters as they were trained, models not.

    Raises:
        ValueError, OSError: no such model, a damaged one, or names that are not one for each and different.
    """
    if names and len(names) != len(models):
        raise ValueError(f"--model_names: found {len(names)} names for {len(models)} models")
    columns = list(names) or _names_of(models)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {twice[0]}: tell them apart with --model_names")
    for name in columns:
        too_long = len(name.encode("utf-8", "replace")) > LONGEST_NAME
        if name in RESERVED or not name.strip() or "/" in name or not name.isprintable() or too_long:
            raise ValueError(f"a model is called {name!r}: name it otherwise with --model_names")
    return [_find_model(given, name, dtype, load_in_4bit) for given, name in zip(models, columns, strict=True)]


def _names_of(models: Sequence[str]) -> list[str]:
    # The last part of each path, and as many before it as tell it from the others.
    parts = [(Path(given).resolve() if Path(given).is_dir() else Path(given)).parts for given in models]
    depth = [1] * len(parts)
    while True:
        names = ["-".join(part[-count:]).replace("/", "") for part, count in zip(parts, depth, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(parts[i])]
        if not alike:
            return names
        for i in alike:
            depth[i] += 1


def _find_model(given: str, name: str, dtype: str, load_in_4bit: bool | None) -> EvaluatedModel:
    folder, adapter, path = Path(given), None, given
    if not folder.is_dir():
        if given.count("/") != 1 or given.startswith((".", "/")):
            raise FileNotFoundError(f"{given} is not there: expected a folder, or a hub name (OWNER/NAME)")
        marks = [_hub_mark(given)]
    else:
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            adapter = folder
        damage = find_damage(folder, "adapter" if adapter else "model")
        if damage:
            raise ValueError(f"{folder} cannot be evaluated: {damage}")
        path, marks = str(folder), [fingerprint(folder)]
    manifest = read_manifest(folder) if adapter else {}
    if adapter:
        path = _base_of(adapter)
        marks.append(fingerprint(path) if Path(path).is_dir() else _hub_mark(path))
    trained = manifest.get("precision", {})
    in_4bit = bool(trained.get("load_in_4bit", False)) if load_in_4bit is None else load_in_4bit
    precision = resolve_precision("transformers", dtype, in_4bit)
    marks += [precision.dtype, "4-bit" if in_4bit else "whole"]
    return EvaluatedModel(name, path, adapter, precision, hashlib.sha256("\n".join(marks).encode()).hexdigest())


def _hub_mark(name: str) -> str:
    # Which revision of a model it is, if the hub or what was fetched of it says so.
    return f"{fingerprint(name)} {getattr(check_base(name), '_commit_hash', None)}"


def _base_of(adapter: Path) -> str:
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{adapter} does not say which model it goes onto: its adapter_config.json names no base")
    if not Path(named).is_dir():
        if Path(named).is_absolute():
            raise FileNotFoundError(f"{adapter} goes onto {named}, which is not there: bring it back")
        return named
    damage = find_damage(Path(named))
    if damage:
        raise ValueError(f"{adapter} goes onto {named}, which is damaged: {damage}")
    return named


def load_evaluated(model: EvaluatedModel, max_seq_length: int) -> Any:
    """The model on this machine's device, with its adapter if it has one."""
    loaded, _ = load_model(model.path, model.precision, max_seq_length)
    return loaded if model.adapter is None else load_adapter(loaded, model.adapter)


def free_memory() -> None:
    """Give back what models that are no longer used have held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_batch_size(model: Any, tokens: int) -> int:
    """How many rows to decode at once: on a CUDA device as many as a third of the free memory holds, up to 256.

    Args:
        model: says how large its cache is.
        tokens: of the longest row.
    """
    import torch

    if not torch.cuda.is_available():
        return 32
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * torch.empty(0, dtype=model.dtype).element_size() * tokens
    return int(min(256, max(1, torch.cuda.mem_get_info()[0] // 3 // row)))


# ---------------------------------------------------------------------------------------------------------------------
# Replies, each computed once


class Replies:
    """What one model replies to prompts. What the cache has is not computed again, and no weights are loaded for it."""

    def __init__(self, model: EvaluatedModel, settings: Any):
        """See the class.

        Args:
            model: whose replies.
            settings: of evaluate_arc.py.

        Raises:
            ValueError: no room for a prompt beside the longest reply, or a tokenizer that cannot be used.
        """
        self.evaluated, self.settings = model, settings
        self.cache: diskcache.Cache | None = None
        self.tokenizer = load_tokenizer(_tokenizer_folder(model))
        if self.tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {model.name} has no end token (eos_token): no reply could end")
        self.encoder = SampleEncoder(self.tokenizer, **format_options(self.tokenizer.eos_token))
        longest = _longest_reply(self.encoder)
        self.max_new_tokens = min(longest, settings.max_new_tokens or longest)
        self.context = min(settings.max_seq_length, _longest_context(model.path) or settings.max_seq_length)
        self.prompt_tokens = self.context - self.max_new_tokens
        if self.prompt_tokens < 16:
            raise ValueError(
                f"{model.name} takes rows of {self.context} tokens, of which a reply may need {self.max_new_tokens}: "
                "raise --max_seq_length or lower --max_new_tokens"
            )
        self.longest = self.context  # tokens of the longest row, where that is known
        self.seconds = 0.0
        self._model: Any = None
        self._batch_size = settings.batch_size
        self._scored_at_once: int | None = None  # rows, where memory ran out for more

    def use_cache(self, cache: diskcache.Cache) -> None:
        """Look for replies in a cache, as `result_cache.open_cache` gives it, and keep them there."""
        self.cache = cache

    @property
    def model(self) -> Any:
        """The model, loaded when it is first needed."""
        if self._model is None:
            with user_errors():
                self._model = load_evaluated(self.evaluated, self.context)
            self._batch_size = self._batch_size or default_batch_size(self._model, self.longest)
        return self._model

    @property
    def batch_size(self) -> int:
        """Rows decoded at once."""
        return self._batch_size or 32

    def close(self) -> None:
        """Let go of the model."""
        self._model = None
        free_memory()

    def greedy(
        self,
        prompts: Sequence[np.ndarray],
        guesses: Sequence[np.ndarray | None],
        tick: Callable[[], None] = lambda: None,
    ) -> list[Reply]:
        """The greedy reply to each prompt, or its begin where that can become no grid; `tick` is called for each."""

        def compute(missing: list[int], keep: Callable[[int, Any], None]) -> None:
            self._sample(missing, prompts, guesses, keep, samples=1, temperature=0.0)

        names = [self._name("greedy", prompt, self.max_new_tokens) for prompt in prompts]
        return [replies[0] for replies in self._computed(names, compute, tick, least=1)]

    def sampled(
        self, prompts: Sequence[np.ndarray], guesses: Sequence[np.ndarray | None], samples: int, temperature: float
    ) -> list[list[Reply]]:
        """Different samples of each prompt's replies."""
        seed = self.settings.seed

        def compute(missing: list[int], keep: Callable[[int, Any], None]) -> None:
            # The prompts' own numbers: which others are computed with them makes no difference then.
            own = [int(_mark(prompts[i])[:8], 16) for i in missing]
            more = {"samples": samples, "temperature": temperature, "seed": seed, "seeds": own}
            self._sample(missing, prompts, guesses, keep, **more)

        names = [self._name("sample", p, self.max_new_tokens, samples, temperature, seed) for p in prompts]
        found = self._computed(names, compute)
        return [list({reply.tokens.tobytes(): reply for reply in replies}.values()) for replies in found]

    def _sample(
        self,
        chosen: list[int],
        prompts: Sequence[np.ndarray],
        guesses: Sequence[np.ndarray | None],
        keep: Callable[[int, Any], None],
        **how: Any,
    ) -> None:
        lines_sep = self.encoder.format["lines_sep"]

        def hopeless(tokens: list[int]) -> bool:
            return not can_become_grid(self.tokenizer.decode(tokens, skip_special_tokens=False), lines_sep)

        work = Work()
        sample_replies(
            self.model, "transformers", self.tokenizer, [prompts[i] for i in chosen],
            max_new_tokens=self.max_new_tokens, guesses=[guesses[i] for i in chosen], batch_size=self.batch_size,
            hopeless=hopeless, done=lambda i, replies: keep(chosen[i], _plain(replies)), work=work, **how,
        )  # fmt: skip
        self._batch_size = work.batch_size or self._batch_size

    def searched(
        self, prompts: Sequence[np.ndarray], guesses: Sequence[np.ndarray | None], min_prob: float
    ) -> list[list[Reply]]:
        """All replies to each prompt that are at least so probable; guesses only make finding them faster."""

        def compute(missing: list[int], keep: Callable[[int, Any], None]) -> None:
            work = Work()
            search_replies(
                self.model, "transformers", self.tokenizer, [prompts[i] for i in missing],
                max_new_tokens=self.max_new_tokens, min_prob=min_prob, guesses=[guesses[i] for i in missing],
                batch_size=self.batch_size, done=lambda i, replies: keep(missing[i], _plain(replies)), work=work,
            )  # fmt: skip
            # Where memory ran out once it would again, and each time costs what was computed until then.
            self._batch_size = work.batch_size or self._batch_size

        names = [self._name("search", prompt, self.max_new_tokens, min_prob) for prompt in prompts]
        return self._computed(names, compute)

    def scored(self, prompts: Sequence[np.ndarray], replies: Sequence[Sequence[np.ndarray]]) -> list[list[float]]:
        """Log probabilities of given replies to each prompt."""
        names = [self._name("scores", prompt) for prompt in prompts]
        marks = [[_mark(reply) for reply in part] for part in replies]
        # All scores of a prompt stand in one entry: there are many of them, and one read is as dear as another.
        known: dict[str, dict[str, float]] = {name: self._stored(name, _are_scores) or {} for name in set(names)}
        missing = {
            (name, mark): (prompt, reply)
            for name, prompt, part, part_marks in zip(names, prompts, replies, marks, strict=True)
            for reply, mark in zip(part, part_marks, strict=True)
            if mark not in known[name]
        }
        if missing:
            begin, work = time.perf_counter(), Work()
            computed = score_replies(
                self.model, "transformers", self.tokenizer, [p for p, _ in missing.values()],
                [r for _, r in missing.values()],
                batch_size=min(max(1, self.batch_size // 4), self._scored_at_once or self.batch_size), work=work,
            )  # fmt: skip
            self._scored_at_once = work.batch_size or self._scored_at_once
            for (name, mark), value in zip(missing, computed, strict=True):
                known[name][mark] = value
            with self.cache.transact():
                for name in {name for name, _ in missing}:
                    self.cache.set(name, known[name])
            self.seconds += time.perf_counter() - begin
        return [[known[name][mark] for mark in part] for name, part in zip(names, marks, strict=True)]

    def _name(self, kind: str, prompt: np.ndarray, *settings: Any) -> str:
        return f"{kind} {self.evaluated.identity} {_mark(prompt)} {' '.join(map(str, settings))}"

    def _computed(
        self,
        names: Sequence[str],
        compute: Callable[[list[int], Callable[[int, Any], None]], None],
        tick: Callable[[], None] = lambda: None,
        least: int = 0,
    ) -> list[list[Reply]]:
        # Replies by name, from the cache or computed, each kept as soon as it is there. Equal names are computed once.
        def is_good(value: Any) -> bool:
            return _are_replies(value, len(self.tokenizer), least)

        values: dict[str, Any] = {}
        missing: dict[str, int] = {}
        for i, name in enumerate(names):
            if name in values or name in missing:
                tick()
            elif (value := self._stored(name, is_good)) is not None:
                values[name] = value
                tick()
            else:
                missing[name] = i

        def keep(i: int, value: Any) -> None:
            self.cache.set(names[i], value)
            values[names[i]] = value
            tick()

        if missing:
            _ = self.model  # loading is no part of the time
            begin = time.perf_counter()
            compute(list(missing.values()), keep)
            self.seconds += time.perf_counter() - begin
        return [_replies(values[name]) for name in names]

    def _stored(self, name: str, is_good: Callable[[Any], bool]) -> Any:
        # What the cache holds by that name, None: nothing. Whoever wrote it may have written anything.
        value = self.cache.get(name)
        if value is not None and not is_good(value):
            raise UntrustedCacheError(self.cache.directory, f"an entry of another form ({name.split()[0]})")
        return value


def _tokenizer_folder(model: EvaluatedModel) -> str | Path:
    # The stages save one with each adapter; peft itself does not, and the base's is meant then.
    if model.adapter is not None and (model.adapter / "tokenizer.json").is_file():
        return model.adapter
    return model.path


def _longest_reply(encoder: SampleEncoder) -> int:
    # Where digits merge, how far they do can depend on which they are: each colour alone, and some grids of all.
    side, rng = MAX_SIDE, np.random.default_rng(0)
    grids = [np.full((side, side), colour, dtype=np.uint8) for colour in range(10)]
    if not encoder.one_token_per_cell:
        grids += [rng.integers(0, 10, size=(side, side), dtype=np.uint8) for _ in range(10)]
    return max(len(encoder.encode_reply(grid)) for grid in grids)


def _longest_context(path: str) -> int | None:
    # Some kinds of models name no limit, because their positions have none.
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "max_position_embeddings", None)


def _mark(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()[:32]


def _are_replies(value: Any, vocabulary: int, least: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= least
        and all(isinstance(reply, list) and len(reply) == 2 for reply in value)
        and all(type(log_prob) is float and isinstance(tokens, list) for log_prob, tokens in value)
        and all(type(token) is int and 0 <= token < vocabulary for _, tokens in value for token in tokens)
    )


def _are_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(type(score) is float for score in value.values())


def _plain(replies: Sequence[Reply]) -> list[Any]:
    return [[reply.log_prob, reply.tokens.tolist()] for reply in replies]


def _replies(value: list[Any]) -> list[Reply]:
    return [Reply(np.array(tokens, dtype=np.int64), log_prob) for log_prob, tokens in value]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclass
class Answer:
    """What a model says to one test input.

    Args:
        views: how many of its views fit the context; 0: not even the first, there is no answer.
        shortened: of how many views demonstrations were left out to fit.
        left_out: how many views did not fit with one demonstration; 0 where the first did not.
        greedy: the grid of the greedy reply to the first view, None: it is no grid.
        greedy_log_prob: log probability of that reply; None: there is none.
        candidates: different grids, scored under all views.
        truth: log probability of the solution in the first view; None: unknown.
    """

    views: int = 0
    shortened: int = 0
    left_out: int = 0
    greedy: np.ndarray | None = None
    greedy_log_prob: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    truth: float | None = None


@dataclass
class _Row:
    """One view as it is asked."""

    key: str  # as shortened to fit
    prompt: np.ndarray
    guess: np.ndarray  # the test input as a reply: many a solution is like it


def answer_puzzles(
    replies: Replies, dataset: ArcDataset, settings: Any, report: Callable[[str, Answer], None]
) -> dict[str, Answer]:
    """Answers of one model to all test inputs.

    First the greedy replies to the first views, which are then what a search of the others verifies before it looks
    further; then, some puzzles at a time, candidates from all views and their scores under all views.

    Args:
        replies: of the model.
        dataset: the puzzles.
        settings: of evaluate_arc.py.
        report: called with each test input and its answer.
    """
    asked = {key: _fitting_views(replies, dataset, key, settings) for key in dataset.keys}
    answers = {
        key: Answer(len(rows), shortened, settings.views - len(rows) if rows else 0)
        for key, (rows, shortened) in asked.items()
    }
    answered = [key for key in dataset.keys if answers[key].views]
    prompts = (len(row.prompt) for rows, _ in asked.values() for row in rows)
    replies.longest = max(prompts, default=0) + replies.max_new_tokens
    with progress(f"{replies.evaluated.name}: first guesses", len(answered)) as bar:
        rows = [asked[key][0][0] for key in answered]
        first = replies.greedy([row.prompt for row in rows], [row.guess for row in rows], lambda: bar.update())
    greedy = dict(zip(answered, first, strict=True))
    for key in set(dataset.keys) - set(answered):
        report(key, answers[key])
    size = max(1, CHUNK * replies.batch_size // settings.views)
    for begin in range(0, len(answered), size):
        chunk = answered[begin : begin + size]
        _answer(replies, dataset, settings, {key: asked[key][0] for key in chunk}, greedy, answers)
        for key in chunk:
            report(key, answers[key])
    return answers


def _fitting_views(replies: Replies, dataset: ArcDataset, key: str, settings: Any) -> tuple[list[_Row], int]:
    # The rows of the views that fit, none if the first does not, and how many have lost demonstrations.
    rows, shortened = [], 0
    for number, view in enumerate(view_keys(dataset, key, settings.views, settings.seed, settings.keep_background)):
        try:
            [row] = replies.encoder.encode(dataset, [view], max_tokens=replies.prompt_tokens, reply=False)
        except ValueError:
            if number == 0:
                break
            continue
        rows.append(_Row(row["key"], row["input_ids"], replies.encoder.encode_reply(dataset[view]["test"])))
        shortened += row["key"] != view
    return rows, shortened


def _answer(
    replies: Replies,
    dataset: ArcDataset,
    settings: Any,
    asked: dict[str, list[_Row]],
    greedy: dict[str, Reply],
    answers: dict[str, Answer],
) -> None:
    # Candidates of some test inputs from all their views, and their scores.
    def grid_of(reply: Reply, key: str) -> np.ndarray | None:
        text = replies.tokenizer.decode(reply.tokens, skip_special_tokens=False)
        options = replies.encoder.format
        return dataset.decode(text, options["lines_sep"], key=key, reply_end=options["reply_end"])[0]

    def reply_of(grid: np.ndarray, key: str) -> np.ndarray:
        return replies.encoder.encode_reply(dataset.transform_array(grid, key.split(".")[1:]))

    rows = [(key, row) for key, views in asked.items() for row in views]
    for key in asked:
        answers[key].greedy = grid_of(greedy[key], asked[key][0].key)
        answers[key].greedy_log_prob = greedy[key].log_prob
    prompts = [row.prompt for _, row in rows]
    guesses = [
        row.guess if answers[key].greedy is None else reply_of(answers[key].greedy, row.key) for key, row in rows
    ]
    if settings.decoding == "search":
        found = replies.searched(prompts, guesses, settings.min_prob)
    elif settings.decoding == "sample":
        found = replies.sampled(prompts, guesses, settings.samples, settings.temperature)
    else:
        found = [[reply] for reply in replies.greedy(prompts, guesses)]
    of_key: dict[str, list[list[Reply]]] = {key: [] for key in asked}
    for (key, _), part in zip(rows, found, strict=True):
        of_key[key].append(part)
    wanted: list[tuple[np.ndarray, list[np.ndarray]]] = []
    for key, views in asked.items():
        first = of_key[key][0]
        if all(reply.tokens.tobytes() != greedy[key].tokens.tobytes() for reply in first):
            first.append(greedy[key])  # however improbable it is: the first guess of a model that is sure of nothing
        decoded = [
            [(grid_of(reply, row.key), reply.log_prob) for reply in part]
            for row, part in zip(views, of_key[key], strict=True)
        ]
        answers[key].candidates = gather_candidates(decoded)
        wanted += [
            (row.prompt, [reply_of(candidate.grid, row.key) for candidate in answers[key].candidates]) for row in views
        ]
        solution = dataset[key]["solution"]
        if solution is not None:
            wanted.append((views[0].prompt, [reply_of(solution, views[0].key)]))
    known = _known_scores(asked, of_key)
    scores = iter(_scores(replies, wanted, known))
    for key, views in asked.items():
        under = [next(scores) for _ in views]
        for number, candidate in enumerate(answers[key].candidates):
            candidate.scored = [view[number] for view in under]
        if dataset[key]["solution"] is not None:
            answers[key].truth = next(scores)[0]


def _known_scores(asked: dict[str, list[_Row]], of_key: dict[str, list[list[Reply]]]) -> dict[tuple[str, str], float]:
    # What decoding has told already: (prompt, reply) -> log probability.
    return {
        (_mark(row.prompt), _mark(reply.tokens)): reply.log_prob
        for key, views in asked.items()
        for row, part in zip(views, of_key[key], strict=True)
        for reply in part
    }


def _scores(
    replies: Replies, wanted: Sequence[tuple[np.ndarray, list[np.ndarray]]], known: dict[tuple[str, str], float]
) -> list[list[float]]:
    marks = [(_mark(prompt), [_mark(reply) for reply in part]) for prompt, part in wanted]
    todo = [
        [reply for reply, mark in zip(part, part_marks, strict=True) if (of, mark) not in known]
        for (_, part), (of, part_marks) in zip(wanted, marks, strict=True)
    ]
    computed = replies.scored([prompt for prompt, _ in wanted], todo)
    known = dict(known)
    for (of, _), part, values in zip(marks, todo, computed, strict=True):
        known |= {(of, _mark(reply)): value for reply, value in zip(part, values, strict=True)}
    return [[known[of, mark] for mark in part_marks] for of, part_marks in marks]


@contextlib.contextmanager
def progress(title: str, count: int) -> Iterator[Any]:
    """A progress bar that counts puzzles."""
    from tqdm import tqdm

    with tqdm(total=count, desc=title, unit="puzzle", dynamic_ncols=True, smoothing=0) as bar:
        yield bar
