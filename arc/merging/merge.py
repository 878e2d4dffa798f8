"""Merge an adapter into its base, and prove the merge.

    python arc/merging/merge.py output/Llama-3.2-1B-Base-lora output/Llama-3.2-1B-Base-merged

proves a pair of folders that exist already and prints one line; it ends with 1 and says what differs if they do not
belong together. The stages call `merge_and_check`, which merges first.

Three things are proved, each by a function of its own: every weight is base + adapter rounded once (`check_weights`),
the model that plain transformers loads from the disk answers as base + adapter does (`check_behaviour`), and the
vocabulary is the adapter's (`check_vocabulary`). How the merge answers compared with the model as it was trained is
reported beside that, from the *probe* that was recorded when the training ended (`record_probe`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.decoding.greedy import generate_replies
from arc.models.loading import (
    KEPT_CHARACTERS,
    Precision,
    decoding,
    format_duration,
    load_adapter,
    load_model,
    load_tokenizer,
    read_manifest,
)
from arc.puzzles.dataset import ArcDataset, format_options
from arc.puzzles.encoding import SampleEncoder

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "arc.merging")
PROBE = "probe.safetensors"
PROBE_POSITIONS = 32  # of each row, at most
PROBE_BYTES = 15 * 2**20  # of its log probabilities
# Operations that one pass over the probe may take: about 20 s in float32 on a slow machine of its kind.
PROBE_OPERATIONS = {"cuda": 2e14, "cpu": 1e12}
LOGIT_BYTES = 2**27  # of a batch's logits

KL_FACTOR = 4.0  # of what rounding the weights explains, see `check_behaviour`
KL_FLOOR = 1e-9  # nats a token: what two orders of summation in float32 may be apart

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BLOCK = 2**22  # weights that are compared at once


class MergeError(RuntimeError):
    """A merged model is not what it should be; the message says what differs, by how much, and where."""


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base and write a standalone 16-bit model.

    The sum is made in float32 and rounded once. `quantised`: onto the base as the adapter was trained on it, that is
    4-bit weights dequantised (what training saw, so the merge behaves as the trained model did). `original`: onto the
    16-bit base. An adapter that was trained on a 16-bit base gives the same either way.

    Args:
        adapter: a `-lora` folder.
        out: an existing folder, written into.
        base: the 16-bit base folder; default: the one that the adapter names.
        merge_base: "quantised" or "original".
        precision: how the base was loaded in training; default: as the adapter's manifest says.

    Returns:
        What was done, for the manifest.

    Raises:
        ValueError: unknown `merge_base`, or an adapter that does not say how its base was loaded.
        FileNotFoundError: the adapter has no safetensors file.
    """
    import torch

    plan = _plan_merge(adapter, base, merge_base, precision)
    model = load_merge_base(plan.base, plan.quantised, _device())
    # A 16-bit type as saved: the base's own, or float16 if that is what the arithmetic of the training was.
    float16 = plan.precision is not None and plan.precision.dtype == "float16"
    dtype = torch.float16 if float16 else saved_dtype(plan.base)
    with _full_float32():
        merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    if merged.config.tie_word_embeddings:
        merged.tie_weights()
    merged = merged.to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(str(out))
    load_tokenizer(adapter).save_pretrained(str(out))
    onto = "quantised" if plan.quantised else "16-bit"
    return {"merge_base": merge_base, "merged_onto": onto, "dtype": str(dtype)[6:]}


def saved_dtype(folder: str | Path) -> torch.dtype:
    """The 16-bit type that a model folder is stored in (bfloat16 for one stored in float32)."""
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def load_merge_base(base: str | Path, precision: Precision | None, device: str = "cpu") -> Any:
    """Load a base in float32, its linear layers as 4-bit training saw them if `precision` is given.

    Args:
        base: a 16-bit model folder.
        precision: how it was loaded in training, or None for the 16-bit weights.
        device: where to quantise and add; the same kind of device as in training gives the same 4-bit values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, device_map={"": device}, trust_remote_code=False, use_safetensors=True
    )
    if precision is None or not precision.load_in_4bit:
        return model
    import bitsandbytes as bnb

    trained, _ = load_model(base, replace(precision, engine="transformers"))
    with torch.no_grad():
        for name, module in trained.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # Rounded to the compute type first, as each forward pass of the training did; then exact in float32.
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).to(
                    precision.torch_dtype
                )
                model.get_submodule(name).weight.copy_(weight)
            else:
                for own, value in module.named_parameters(recurse=False):
                    model.get_submodule(name).get_parameter(own).copy_(value)
    return model


@dataclass(frozen=True)
class _Plan:
    """What is merged onto what: `quantised` is the precision of the 4-bit base to merge onto, or None for 16 bits."""

    base: str | Path
    precision: Precision | None
    quantised: Precision | None


def _plan_merge(adapter: str | Path, base: str | Path | None, merge_base: str, precision: Precision | None) -> _Plan:
    from peft import PeftConfig

    if merge_base not in ("quantised", "original"):
        raise ValueError(f"merge_base is {merge_base!r}: expected 'quantised' or 'original'")
    if not (Path(adapter) / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{adapter} has no {ADAPTER_WEIGHTS}: expected the folder of an adapter")
    if precision is None:
        recorded = read_manifest(adapter).get("precision")
        if recorded is None and merge_base == "quantised":
            raise ValueError(f"{adapter} does not record how its base was loaded: merge with --merge_base original")
        precision = Precision(**recorded) if recorded else None
    quantised = precision if merge_base == "quantised" and precision is not None and precision.load_in_4bit else None
    return _Plan(base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path, precision, quantised)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # Whoever has asked for TF32 products (Unsloth does) asked for speed in training: 10 bits are too few for a sum that
    # is to be rounded once.
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------------------------
# The probe: what the trained model itself answers


@dataclass(frozen=True)
class Probe:
    """Rows, the positions of them that are looked at, and what a trained model answered there.

    Attributes:
        rows: token ids, int64 (tokens,) each.
        prompt_lengths: tokens before the last reply, int64 (rows,).
        positions: int64 (rows, positions); position t is where token t + 1 is predicted.
        log_probabilities: of the next token as the model was trained, float32 (rows, positions, vocabulary); None where
            no trained model was asked.
        greedy: its greedy replies to the first rows' prompts, int64 (tokens,) each, end token included.
    """

    rows: list[np.ndarray]
    prompt_lengths: np.ndarray
    positions: np.ndarray
    log_probabilities: torch.Tensor | None = None
    greedy: Sequence[np.ndarray] = ()


def record_probe(
    model: Any,
    engine: str,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    path: str | Path,
    *,
    greedy_rows: int = 16,
) -> None:
    """Record what a model answers as it was trained, while it is still in memory.

    As many of the rows as cost little are asked: about 20 s of a slow machine and 16 MB (a whole vocabulary of 128k
    entries: 7 rows of 4 positions). The random state is neither used nor moved.

    Args:
        model: the trained model, of any engine, in training or not.
        engine: "unsloth" or "transformers".
        tokenizer: the one that it was trained with.
        rows: held-out rows with their replies, as `SampleEncoder.encode` gives them.
        path: the file to write, `PROBE` in the adapter's folder.
        greedy_rows: greedy replies to at most this many of the first rows' prompts are recorded too.

    Raises:
        ValueError: no rows, or a row without a reply.
    """
    import torch
    from safetensors.torch import save_file

    probe = plan_probe(rows, model, model.config.vocab_size)
    with decoding(model, engine), _unsloth_logits(engine):
        answers = _answers(model, probe, engine)
    count, longest = _affordable_replies(model, probe, greedy_rows)
    prompts = [row[:length] for row, length in zip(probe.rows, probe.prompt_lengths, strict=True)][:count]
    replies = generate_replies(model, engine, tokenizer, prompts, longest) if prompts else []
    save_file(
        {
            "input_ids": torch.from_numpy(np.concatenate(probe.rows)),
            "row_ends": torch.from_numpy(np.cumsum([len(row) for row in probe.rows])),
            "prompt_lengths": torch.from_numpy(probe.prompt_lengths),
            "positions": torch.from_numpy(probe.positions),
            "log_probabilities": answers.float(),
            "greedy_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *replies])),
            "greedy_ends": torch.from_numpy(np.cumsum([len(reply) for reply in replies], dtype=np.int64)),
        },
        str(path),
        metadata={"keys": json.dumps([str(row.get("key")) for row in rows[: len(probe.rows)]])},
    )


def read_probe(folder: str | Path) -> Probe | None:
    """The probe of an adapter's folder, or None if none was recorded.

    Raises:
        ValueError: it is there and cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / PROBE
    if not path.is_file():
        return None
    try:
        stored = load_file(str(path))
        rows, replies = (
            np.split(stored[f"{name}_ids"].numpy(), stored[f"{ends}_ends"].numpy())[:-1]
            for name, ends in (("input", "row"), ("greedy", "greedy"))
        )
        return Probe(
            rows,
            stored["prompt_lengths"].numpy(),
            stored["positions"].numpy(),
            stored["log_probabilities"],
            replies,
        )
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): train again, or move it aside") from None


def make_probe_rows(tokenizer: Any) -> list[dict[str, Any]]:
    """A few puzzles in the text format, always the same, for adapters that have no probe.

    Args:
        tokenizer: a tokenizer with an end token.

    Returns:
        Rows with their replies, as `SampleEncoder.encode` gives them.
    """
    rng = np.random.default_rng(0)
    challenge = {}
    for number in range(16):
        inputs = [rng.integers(0, 10, size=rng.integers(3, 7, size=2)) for _ in range(4)]
        pairs = [{"input": grid, "output": np.rot90(grid, number % 4)} for grid in inputs]
        challenge[f"probe{number:02d}"] = {"train": pairs[:3], "test": pairs[3:]}
    puzzles = ArcDataset(challenge)
    return SampleEncoder(tokenizer, **format_options(tokenizer.eos_token)).encode(puzzles, puzzles.keys)


def plan_probe(rows: Sequence[dict[str, Any]], model: Any, vocabulary: int) -> Probe:
    """Choose how many rows, and which of their positions, a model is asked; by a fixed rule.

    Three quarters of the positions are spread over the last reply, the rest over all that stands before it.

    Args:
        rows: rows with their replies; the first ones are taken, one at least.
        model: its size and device decide how many.
        vocabulary: entries of an answer.

    Raises:
        ValueError: no rows, or a row without a reply.
    """
    if not rows:
        raise ValueError("there are no rows to ask the model: expected at least one held-out row with its reply")
    for row in rows:
        if not len(row["reply_spans"]):
            raise ValueError(f"row {row.get('key')} has no reply: expected rows as encoded with their replies")
    ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
    fitting = max(1, PROBE_BYTES // (4 * vocabulary))  # positions of all rows together
    positions = min(PROBE_POSITIONS, fitting, max(4, fitting // len(rows)))
    count = min(_affordable_rows(ids, model), fitting // positions)
    spans = [row["reply_spans"][-1] for row in rows[:count]]
    chosen = [_spread(int(begin), int(end), positions) for begin, end in spans]
    return Probe(ids[:count], np.array([begin for begin, _ in spans], dtype=np.int64), np.stack(chosen))


def _spread(begin: int, end: int, count: int) -> np.ndarray:
    # Positions that predict the reply [begin, end), and positions before them. No two are the same in a row that has
    # `count` tokens.
    inside = min(count - count // 4, end - begin)
    before = np.linspace(0, max(begin - 2, 0), count - inside)
    return np.concatenate([before, np.linspace(begin - 1, end - 2, inside)]).round().astype(np.int64)


def _operations(model: Any) -> tuple[float, float]:
    # Operations of one token, and how many one pass over the probe may take.
    kind = "cuda" if model.get_input_embeddings().weight.is_cuda else "cpu"
    return 2 * sum(p.numel() for p in model.parameters()), PROBE_OPERATIONS[kind]


def _affordable_rows(rows: Sequence[np.ndarray], model: Any) -> int:
    each, budget = _operations(model)
    costs = each * np.cumsum([len(row) for row in rows])
    return max(1, int(np.searchsorted(costs, budget, side="right")))


def _affordable_replies(model: Any, probe: Probe, most: int) -> tuple[int, int]:
    # How many greedy replies cost no more than a pass over the probe, and how long they may be. A step of decoding
    # reads all weights for few tokens: it takes about as long as 64 tokens of a prompt, whatever the batch.
    each, budget = _operations(model)
    longest = max(len(row) - length for row, length in zip(probe.rows, probe.prompt_lengths, strict=True))
    for count in range(min(most, len(probe.rows)), 0, -1):
        if each * (probe.prompt_lengths[:count].sum() + 64 * longest * math.ceil(count / 8)) <= budget:
            return count, int(longest)
    return 0, int(longest)


@contextlib.contextmanager
def _unsloth_logits(engine: str) -> Iterator[None]:
    # Unsloth's forward pass returns no logits unless it is asked for them.
    name = "UNSLOTH_RETURN_LOGITS"
    before = os.environ.get(name)
    if engine == "unsloth":
        os.environ[name] = "1"
    try:
        yield
    finally:
        if engine == "unsloth":
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def log_probabilities(model: Any, engine: str, row: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """What a model, in training or not, gives for the token after each of these positions of a row.

    Args:
        model: of any engine.
        engine: "unsloth" or "transformers".
        row: token ids (tokens,).
        positions: rising, int (positions,).

    Returns:
        Natural logarithms, float64 (positions, vocabulary), on the CPU.
    """
    with decoding(model, engine), _unsloth_logits(engine):
        return _log_probabilities(model, [row], [positions], engine)[0]


def _answers(model: Any, probe: Probe, engine: str = "transformers") -> torch.Tensor:
    """Log probabilities at the probe's positions, float64 (rows, positions, vocabulary), on the CPU."""
    import torch

    return torch.stack(_log_probabilities(model, probe.rows, list(probe.positions), engine))


def _log_probabilities(
    model: Any, rows: Sequence[np.ndarray], wanted: Sequence[np.ndarray], engine: str = "transformers"
) -> list[torch.Tensor]:
    # float64 (positions, vocabulary) of each row. Padding is on the right, where no token of a row can see it: Unsloth
    # is given no mask, as in training. Plain transformers applies the head only where it is needed (a whole
    # vocabulary's logits take gigabytes).
    import torch

    found: list[torch.Tensor | None] = [None] * len(rows)
    device, vocabulary = model.get_input_embeddings().weight.device, model.config.vocab_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    largest = max(1, LOGIT_BYTES // (4 * vocabulary * max(len(row) for row in rows)))
    size = min(16, largest)
    with torch.no_grad(), _full_float32():
        for first in range(0, len(rows), size):
            batch = order[first : first + size]
            ids = np.zeros((len(batch), max(len(rows[i]) for i in batch)), dtype=np.int64)
            mask = np.zeros_like(ids)
            for at, i in enumerate(batch):
                ids[at, : len(rows[i])], mask[at, : len(rows[i])] = rows[i], 1
            kept = np.unique(np.concatenate([wanted[i] for i in batch]))
            if engine == "unsloth":
                kept, options = np.arange(ids.shape[1]), {}
            else:
                to_keep = torch.from_numpy(kept).to(device)
                options = {"attention_mask": torch.from_numpy(mask).to(device), "logits_to_keep": to_keep}
            logits = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **options).logits
            for at, i in enumerate(batch):
                rows_of_logits = torch.from_numpy(np.searchsorted(kept, wanted[i])).to(device)
                found[i] = torch.log_softmax(logits[at, rows_of_logits].double(), -1).cpu()
    return [log_probabilities for log_probabilities in found if log_probabilities is not None]


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    # KL(p || q) in nats a token of log probabilities (rows, positions, vocabulary).
    p, q = p.double(), q.double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def _same_choice(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class _Sum:
    """Base + adapter in float64, weight by weight: read from the adapter's files without peft.

    The model's state names the weights; of tied ones, the embedding stands for both.
    """

    def __init__(self, model: Any, adapter: str | Path):
        """See the class.

        Raises:
            MergeError: the adapter holds what has no place in the model, or what this reading does not know.
        """
        self.adapter = Path(adapter)
        self.config = json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        self.base = state_without_ties(model)
        self._head, self._embedding = _embedding_names(model)
        self._tied = bool(model.config.tie_word_embeddings)
        self._low_rank: dict[str, dict[str, str]] = {}  # weight -> part -> tensor of the adapter
        self._added: dict[str, str] = {}  # bias -> tensor of the adapter that is added, scaled
        self._full: dict[str, str] = {}  # weight -> tensor of the adapter that replaces it
        self._refuse_unknown()
        self._sort_tensors()

    def _refuse_unknown(self) -> None:
        config = self.config
        known = ("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "alpha_pattern", "layer_replication")
        known += ("trainable_token_indices", "target_parameters", "alora_invocation_tokens")
        used = [name for name in known if config.get(name)]
        if config.get("peft_type") != "LORA" or used:
            what = ", ".join(used) or config.get("peft_type")
            raise MergeError(f"{self.adapter} uses {what}, which this check cannot add up: expected plain LoRA")

    def _sort_tensors(self) -> None:
        from safetensors import safe_open

        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:
            names = list(file.keys())
        for tensor in names:
            name = tensor.removeprefix("base_model.model.")
            module, _, rest = name.partition(".lora_")
            if rest in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
                self._low_rank.setdefault(self._place(f"{module}.weight", tensor), {})[rest] = tensor
            elif rest == "B.bias":
                self._added[self._place(f"{module}.bias", tensor)] = tensor
            else:
                name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
                other = self._full.setdefault(self._place(name, tensor), tensor)
                if not self._are_equal(other, tensor):
                    raise MergeError(f"{self.adapter} holds two matrices, {other} and {tensor}, for one tied one")
        tied = {self._embedding, self._head} if self._tied else set()
        if tied & set(self._low_rank):
            raise MergeError(
                f"{self.adapter} has a low-rank change of one of two tied matrices ({self._embedding}): a tied model "
                "cannot hold the sum; untie the base before training, or train the matrix in full"
            )
        incomplete = [name for name, parts in self._low_rank.items() if len(parts) != 2]
        if incomplete:
            raise MergeError(f"{self.adapter} has half of a low-rank change only for {incomplete[0]}")

    def _are_equal(self, one: str, other: str) -> bool:
        import torch
        from safetensors import safe_open

        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:
            return one == other or torch.equal(file.get_tensor(one), file.get_tensor(other))

    def _place(self, name: str, tensor: str) -> str:
        # A tied model has one matrix for both names.
        name = self._embedding if self._tied and name == self._head else name
        if name not in self.base:
            raise MergeError(f"{self.adapter} holds {tensor}, for which the base has no weight {name}")
        return name

    def scale(self, rank: int) -> float:
        """What a low-rank product is multiplied with: alpha / sqrt(rank) (rsLoRA) or alpha / rank."""
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def blocks(self, name: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The sum of one weight, a block of rows at a time.

        Yields:
            Rows; the sum, float64 (rows, ...); and how far a sum in float32, in whatever order, may be from it: a
            product of rank r errs by at most r + 2 roundings of |B| |A| (here: of the product of the norms of B's rows
            and A's columns, which is no less), the addition by one of the sum.
        """
        from safetensors import safe_open

        base = self.base[name]
        unit = 2.0**-24  # largest relative error of one rounding to float32
        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:

            def load(tensor: str) -> torch.Tensor:
                return file.get_tensor(tensor).to(base.device).double()

            left = right = full = None
            scale = 1.0
            if name in self._full:
                full = file.get_slice(self._full[name])
                if list(full.get_shape()) != list(base.shape):
                    raise MergeError(
                        f"{self._full[name]} of {self.adapter} is {full.get_shape()}, the base's {list(base.shape)}"
                    )
            if name in self._low_rank:
                parts = self._low_rank[name]
                a, b = (load(parts[part]) for part in sorted(parts))
                scale = self.scale(a.shape[0])
                # An embedding is looked up by rows: its change is stored the other way round.
                left, right = (a.T, b.T) if "embedding_A" in parts else (b, a)
                if (left.shape[0], right.shape[1]) != tuple(base.shape):
                    raise MergeError(
                        f"the change of {name} in {self.adapter} is {[left.shape[0], right.shape[1]]}, the base's "
                        f"{list(base.shape)}"
                    )
            added = load(self._added[name]) * self.scale(self._rank_of(name)) if name in self._added else None
            for rows in _blocks(base):
                whole = base[rows] if full is None else full[rows].to(base.device)
                total = whole.double()
                slack = total.new_zeros(())
                if left is not None:
                    total = total + scale * (left[rows] @ right)
                    norms = left[rows].norm(dim=1)[:, None] * right.norm(dim=0)[None]
                    slack = unit * ((left.shape[1] + 2) * abs(scale) * norms + total.abs())
                elif added is not None:
                    total = total + added[rows]
                    slack = 4 * unit * (total.abs() + added[rows].abs())
                yield rows, total, slack

    def _rank_of(self, bias: str) -> int:
        from safetensors import safe_open

        parts = self._low_rank[bias.removesuffix(".bias") + ".weight"]
        with safe_open(str(self.adapter / ADAPTER_WEIGHTS), "pt") as file:
            return int(file.get_slice(parts["A.weight"]).get_shape()[0])


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        yield slice(None)
        return
    rows = max(1, BLOCK // max(1, tensor[0].numel()))
    for first in range(0, tensor.shape[0], rows):
        yield slice(first, min(first + rows, tensor.shape[0]))


def _embedding_names(model: Any) -> tuple[str | None, str | None]:
    # Names of the head's and of the embedding's weight in the model's state.
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return tuple(f"{names[id(module)]}.weight" if id(module) in names else None for module in (head, embedding))


def state_without_ties(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model by name, those of tied embeddings once, under the embedding's name."""
    head, _ = _embedding_names(model)
    skipped = head if model.config.tie_word_embeddings else None
    return {name: tensor for name, tensor in model.state_dict().items() if name != skipped}


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of `dtype`'s numbers at x: the largest error of rounding x to it; subnormals included."""
    import torch

    numbers = torch.finfo(dtype)
    _, exponent = torch.frexp(x)
    # frexp gives x = m * 2**exponent with m in [0.5, 1), so that x's binade begins at 2**(exponent - 1); 0 as 0 * 2**0.
    lowest = round(math.log2(numbers.smallest_normal))
    binade = torch.where(x == 0, lowest, exponent - 1).clamp(min=lowest)
    return torch.ldexp(torch.full_like(x, numbers.eps / 2), binade)


class _Stored:
    """The tensors of a model folder, read from disk as they are asked for."""

    def __init__(self, folder: str | Path):
        """See the class.

        Raises:
            MergeError: there are no safetensors, or a file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self._file_of: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(str(self.folder / name), "pt")
                self._file_of |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                raise MergeError(f"{self.folder / name} cannot be read ({error})") from None

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def slice(self, name: str) -> Any:
        """A tensor whose rows are read when it is indexed."""
        return self._file_of[name].get_slice(name)


def check_weights(model: Any, adapter: str | Path, merged: str | Path) -> dict[str, Any]:
    """Prove that every weight of a merged model is base + adapter, rounded once.

    The sum is made anew in float64, from the adapter's files. A stored weight may differ from it by half an ulp of its
    own type, and by what a sum in float32 may err.

    Args:
        model: the merge base, as `load_merge_base` gives it.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.

    Returns:
        `weights` (how many), `largest_weight_error` in half ulps of the stored type, less what a sum in float32 may err
        (so at most 1), and `largest_weight_error_in`, the tensor.

    Raises:
        MergeError: a tensor is missing, left over, of another shape or type, or off; the worst is named.
    """
    import torch
    from transformers import AutoConfig

    stored, expected = _Stored(merged), _Sum(model, adapter)
    config = AutoConfig.from_pretrained(str(merged), trust_remote_code=False)
    if bool(config.tie_word_embeddings) != bool(model.config.tie_word_embeddings):
        is_tied, was_tied = ("tied" if of.tie_word_embeddings else "not tied" for of in (config, model.config))
        raise MergeError(f"the embeddings of {merged} are {is_tied} by its config.json, those of the base {was_tied}")
    for what, names in (
        ("lacks the base's", sorted(set(expected.base) - stored.names())),
        ("holds, beyond the base's tensors,", sorted(stored.names() - set(expected.base))),
    ):
        if names:
            raise MergeError(f"{merged} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    largest, largest_in, worst, off, weights = -math.inf, "", "", 0, 0
    for name, base in expected.base.items():
        part = stored.slice(name)
        if list(part.get_shape()) != list(base.shape):
            raise MergeError(f"{name} of {merged} is {part.get_shape()}, expected {list(base.shape)}")
        weights += base.numel()
        for rows, total, slack in expected.blocks(name):
            saved = part[rows].to(total.device)
            if saved.dtype != config.dtype or not saved.dtype.is_floating_point:
                raise MergeError(f"{name} of {merged} is {saved.dtype}, its config.json says {config.dtype}")
            step = half_ulp(total, saved.dtype)
            error = (saved.double() - total).abs()
            # In half ulps, beyond what the sum may err. What is not a number is further off than anything.
            steps = torch.nan_to_num((error - slack) / step, nan=math.inf, posinf=math.inf)
            off += int((steps > 1).sum())
            at = int(steps.argmax())
            if float(steps.flatten()[at]) > largest:
                largest, largest_in = float(steps.flatten()[at]), name
                place = [int(i) for i in np.unravel_index(at, steps.shape)]
                place[0] += rows.start
                value = float(saved.flatten()[at])
                limit = f" ({config.dtype} ends at {torch.finfo(config.dtype).max:g})" if math.isinf(value) else ""
                worst = (
                    f"{name}{place} of {merged} is {value:.6g}{limit}, base + adapter {float(total.flatten()[at]):.6g}"
                )
    if off:
        raise MergeError(
            f"{worst}: {largest:.3g} half ulps of {str(config.dtype)[6:]}, where rounding explains 1; {off:,} of "
            f"{weights:,} weights are further off than that"
        )
    return {"weights": weights, "largest_weight_error": max(largest, 0.0), "largest_weight_error_in": largest_in}


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour


def check_behaviour(model: Any, adapter: str | Path, merged: str | Path, probe: Probe) -> dict[str, Any]:
    """Prove that a merged model answers as base + adapter does, up to what rounding its weights explains.

    The reference is the base with the adapter as it is, not merged, by peft; the merge is what plain transformers loads
    from its folder; both calculate in float32. Their distance is KL(reference || merge) in nats a token.

    The bound. A merge errs by rounding each weight once. Errors d move the answers by KL = 1/2 d'Fd to second order (F:
    the Fisher information). F is not known, so its effect is measured on this very model: the sum of base and adapter
    is made once more from the adapter's files, each weight is rounded to the stored type, and this model is asked. A
    right merge differs from it only where a weight lies so near the middle between two numbers that the order of a sum
    in float32 decides; each such weight then errs the other way. Measured on 200 tiny trained models (tied and not, 4
    and 16 bits, bf16 and fp16 stored, learning rates from 1e-5 to 1e-2), the merge's KL was 0.74 to 1.10 times that of
    the rounding; the extremes are float16's, where 0.05% of the weights are so decided. `KL_FACTOR` allows 4 times,
    twice the distance in the answers; `KL_FLOOR` is what float32 itself is unsure of (less than 1e-12 there).

    Independent random errors (even over half an ulp either way) are no yardstick: tried on 36 of the models, their KL
    was 0.3 to 16 times the merge's. Where an adapter's changes are smaller than half an ulp, rounding takes them back:
    such errors are not random but all point against what was learned. They are a right merge's nevertheless; that they
    are large shows in `kl` beside `adapter_kl`.

    Args:
        model: the merge base, as `load_merge_base` gives it. It is used up and left without weights, to make room.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        probe: what to ask. As many of its rows as cost little are.

    Returns:
        `prompts` and `positions` (how many were asked); `kl`; `kl_bound`; `kl_rounding`, which the bound is made of;
        `adapter_kl`, of the base alone: what the adapter has changed; `top1`, the share of positions at which the first
        choice is the reference's. And how the merge answers compared with the model as it was trained, None where the
        probe does not say: `trained_kl`; `trained_top1`; `trained_greedy`, the share of the recorded greedy replies
        that the merge gives token for token.

    Raises:
        MergeError: the merge cannot be loaded whole by plain transformers, or answers otherwise.
    """
    from peft.utils import ModulesToSaveWrapper
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(merged), trust_remote_code=False).dtype
    probe, device = _cut_probe(probe, model), next(model.parameters()).device
    untrained = _answers(model.eval(), probe)
    adapted = load_adapter(model, adapter).eval()
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.to("meta")  # whole matrices that are not used any more
    reference = _answers(adapted, probe)
    plain = adapted.unload()
    del adapted
    _write_sum(plain, adapter)
    unsure = _divergence(reference, _answers(plain, probe))
    _round_weights(plain, dtype)
    rounding = _divergence(reference, _answers(plain, probe))
    if not math.isfinite(rounding):
        raise MergeError(f"base + {adapter} cannot be held in {dtype}: it answers with numbers that are not finite")
    # Two orders of the same sums in float32: the more a model answers to small changes, the further they are apart.
    if not unsure <= KL_FLOOR + 1e-4 * rounding:
        raise MergeError(
            f"what the files of {adapter} add up to answers {unsure:.3g} nats a token away from what peft makes of "
            f"them, expected at most {KL_FLOOR + 1e-4 * rounding:.3g}"
        )
    plain.to("meta")  # as is `model`, which it was made of

    loaded = _load_merged(merged, str(device))
    if loaded.config.vocab_size != reference.shape[-1]:
        raise MergeError(f"{merged} has {loaded.config.vocab_size:,} tokens, base + adapter {reference.shape[-1]:,}")
    answers = _answers(loaded, probe)
    kl, top1, bound = _divergence(reference, answers), _same_choice(reference, answers), KL_FACTOR * rounding + KL_FLOOR
    if not kl <= bound:
        raise MergeError(
            f"{merged} answers {kl:.3g} nats a token away from base + adapter, where rounding to {str(dtype)[6:]} "
            f"explains {rounding:.3g} and {bound:.3g} is allowed; its first choice is the same at {top1:.1%} of "
            f"{probe.positions.size:,} positions"
        )
    return {
        "prompts": len(probe.rows),
        "positions": int(probe.positions.size),
        "kl": kl,
        "kl_float32": unsure,
        "kl_bound": bound,
        "kl_rounding": rounding,
        "adapter_kl": _divergence(reference, untrained),
        "top1": top1,
        **_compare_with_trained(loaded, answers, probe),
    }


def _cut_probe(probe: Probe, model: Any) -> Probe:
    # The machine that checks may be slower than the one that trained.
    count = _affordable_rows(probe.rows, model)
    known = None if probe.log_probabilities is None else probe.log_probabilities[:count]
    return Probe(probe.rows[:count], probe.prompt_lengths[:count], probe.positions[:count], known, probe.greedy[:count])


def compare_with_probe(model: Any, adapter: str | Path) -> tuple[float, float]:
    """How near a loaded model comes to what the trained model answered when its training ended.

    Args:
        model: any transformers or peft model in evaluation mode, such as base + adapter as the manifest says.
        adapter: a `-lora` folder with a probe.

    Returns:
        KL divergence of the trained model's answers to it, in nats a token, and the share of equal first choices.

    Raises:
        ValueError: the adapter has no probe.
    """
    probe = read_probe(adapter)
    if probe is None or probe.log_probabilities is None:
        raise ValueError(f"{adapter} has no {PROBE}: nothing to compare with")
    answers = _answers(model, probe)
    return _divergence(probe.log_probabilities, answers), _same_choice(probe.log_probabilities, answers)


def _compare_with_trained(model: Any, answers: torch.Tensor, probe: Probe) -> dict[str, float | None]:
    result: dict[str, float | None] = dict.fromkeys(("trained_kl", "trained_top1", "trained_greedy"))
    known = probe.log_probabilities
    if known is not None and known.shape == answers.shape and bool(known.isfinite().all()):
        result |= {"trained_kl": _divergence(known, answers), "trained_top1": _same_choice(known, answers)}
    if len(probe.greedy):
        same = 0
        for row, prompt, reply in zip(probe.rows, probe.prompt_lengths, probe.greedy, strict=False):
            # Greedy decoding gives a reply if and only if each of its tokens is the first choice after those before it.
            ids = np.concatenate([row[:prompt], reply])
            [found] = _log_probabilities(model, [ids], [np.arange(prompt - 1, len(ids) - 1)])
            same += found.argmax(-1).tolist() == reply.tolist()
        result["trained_greedy"] = same / len(probe.greedy)
    return result


def _write_sum(model: Any, adapter: str | Path) -> None:
    import torch

    expected = _Sum(model, adapter)
    with torch.no_grad():
        for name in expected.base:
            for rows, total, _ in expected.blocks(name):
                expected.base[name][rows] = total
    if model.config.tie_word_embeddings:
        model.tie_weights()


def _round_weights(model: Any, dtype: torch.dtype) -> None:
    for tensor in state_without_ties(model).values():
        for rows in _blocks(tensor):
            tensor[rows] = tensor[rows].to(dtype).to(tensor.dtype)


def _load_merged(merged: str | Path, device: Any) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(merged),
            dtype=torch.float32,
            device_map={"": str(device)},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise MergeError(f"plain transformers cannot load {merged}: {str(error).strip().splitlines()[-1]}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(name) for name in report.get(what) or [])
        if found:
            raise MergeError(f"{merged} loads with {what.replace('_', ' ')}: {', '.join(found[:3])}")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


def check_vocabulary(adapter: str | Path, merged: str | Path, rows: Sequence[np.ndarray]) -> None:
    """Prove that the tokenizer saved with a merge is the adapter's.

    Args:
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        rows: token ids whose texts both have to encode alike.

    Raises:
        MergeError: they differ in size, in a token, in special tokens, or in what they make of a text.
    """
    ours, theirs = load_tokenizer(adapter), load_tokenizer(merged)
    if len(ours) != len(theirs):
        raise MergeError(f"the tokenizer of {merged} has {len(theirs):,} tokens, the adapter's {len(ours):,}")
    known, found = ours.get_vocab(), theirs.get_vocab()
    for token, number in known.items():
        if found.get(token) != number:
            raise MergeError(
                f"token {token!r} is {found.get(token)} in the tokenizer of {merged}, {number} in the adapter's"
            )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_ids"):
        expected, got = getattr(ours, name), getattr(theirs, name)
        if expected != got:
            raise MergeError(f"{name} of the tokenizer of {merged} is {got}, of the adapter's {expected}")
    for text in [KEPT_CHARACTERS, *(ours.decode(row, skip_special_tokens=False) for row in rows)]:
        expected, got = ours(text)["input_ids"], theirs(text)["input_ids"]
        if expected != got:
            at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), len(expected))
            raise MergeError(
                f"the tokenizer of {merged} encodes {text[:20]!r}... otherwise than the adapter's, from token {at} on"
            )


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def check_merge(
    adapter: str | Path,
    merged: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Prove that a merged model, as it is on the disk, is the sum of merge base and adapter.

    Args:
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        base, merge_base, precision: see `merge_adapter`.

    Returns:
        What `check_weights` and `check_behaviour` give, and `seconds`; numbers and text only, for the manifest.

    Raises:
        MergeError: it is not; the message says what differs.
        ValueError, FileNotFoundError: as `merge_adapter`.
    """
    begin = time.perf_counter()
    plan = _plan_merge(adapter, base, merge_base, precision)
    probe = read_probe(adapter)
    tokenizer = load_tokenizer(adapter)
    rows = probe.rows if probe else [row["input_ids"] for row in make_probe_rows(tokenizer)]
    check_vocabulary(adapter, merged, rows)
    model = load_merge_base(plan.base, plan.quantised, _device())
    weights = check_weights(model, adapter, merged)
    probe = probe or plan_probe(make_probe_rows(tokenizer), model, model.config.vocab_size)
    behaviour = check_behaviour(model, adapter, merged, probe)
    return {**behaviour, **weights, "seconds": round(time.perf_counter() - begin, 1)}


def describe_check(result: dict[str, Any]) -> str:
    """What `check_merge` found, as one line for a log."""
    line = (
        f"merge proven in {format_duration(result['seconds'])}: all {result['weights']:,} weights are base + adapter "
        f"rounded once; reloaded, it answers {result['prompts']} prompts within {result['kl']:.1e} nats a token of "
        f"base + adapter (rounding: {result['kl_rounding']:.1e}, the adapter changes {result['adapter_kl']:.1e}), "
        f"first choice the same at {result['top1']:.2%} of {result['positions']:,} positions"
    )
    if result["trained_kl"] is not None:
        line += f"; to the model as trained: {result['trained_kl']:.1e} nats, first choice {result['trained_top1']:.2%}"
    if result["trained_greedy"] is not None:
        line += f", greedy replies {result['trained_greedy']:.0%} the same"
    return line


def merge_and_check(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    merge_base: str = "quantised",
    precision: Precision | None = None,
    own_process: bool | None = None,
) -> dict[str, Any]:
    """Merge an adapter and prove the merge.

    Args:
        adapter, out, base, merge_base, precision: see `merge_adapter`.
        own_process: do it in a fresh process; default: where Unsloth is loaded in this one, since it changes the models
            that merge and proof want plain.

    Returns:
        What was done, as `merge_adapter` says it, and under "check" what `check_merge` gives.

    Raises:
        MergeError, ValueError, FileNotFoundError: as `merge_adapter` and `check_merge`, from whichever process.
    """
    options = {"base": base, "merge_base": merge_base, "precision": precision}
    if "unsloth" in sys.modules if own_process is None else own_process:
        return _merge_in_own_process(adapter, out, **options)
    done = merge_adapter(adapter, out, **options)
    return {**done, "check": check_merge(adapter, out, **options)}


def _merge_in_own_process(
    adapter: str | Path, out: str | Path, *, base: str | Path | None, merge_base: str, precision: Precision | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [*COMMAND, str(adapter), str(out), "--merge_base", merge_base, "--merge", str(result)]
        command += ["--base", str(base)] if base else []
        command += ["--precision", json.dumps(asdict(precision))] if precision else []
        # The scripts are run from any folder: the process finds the package where this one did.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        # Line by line through this process, so that the output goes wherever this process's goes.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
        if not result.is_file():
            raise RuntimeError(f"the process that merges {adapter} ended with {process.returncode} and no result")
        found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        error = _PASSED_ON[found["error"]](found["message"])
        if found.get("errno") is not None:
            error.errno = found["errno"]
        raise error
    return found


# The first that an error is one of; of another kind only its message comes over.
_PASSED_ON = {
    kind.__name__: kind for kind in (MergeError, FileNotFoundError, ValueError, OSError, MemoryError, RuntimeError)
}


def _end_with_parent() -> None:
    # Whoever started this process holds the other end of its standard input: when that closes, nobody waits any more.
    def wait() -> None:
        # Not sys.stdin: its lock, held here, would keep the interpreter from ending in order.
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """The command line, see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="a -lora folder")
    parser.add_argument("merged", type=Path, help="its -merged folder")
    parser.add_argument("--base", help="the base folder (default: the one that the adapter names)")
    parser.add_argument("--merge_base", choices=("quantised", "original"), help="default: as the merge's manifest says")
    parser.add_argument("--precision", help=argparse.SUPPRESS)  # as JSON
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)  # merge first; the file to write the result into
    args = parser.parse_args()
    options = {
        "base": args.base,
        "merge_base": args.merge_base or read_manifest(args.merged).get("merge_base") or "quantised",
        "precision": Precision(**json.loads(args.precision)) if args.precision else None,
    }
    try:
        if args.merge:
            _end_with_parent()
            result = merge_and_check(args.adapter, args.merged, **options, own_process=False)
            args.merge.write_text(json.dumps(result), encoding="utf-8")
        else:
            print(describe_check(check_merge(args.adapter, args.merged, **options)))
    except Exception as error:
        if args.merge:
            kind = next((name for name, kind in _PASSED_ON.items() if isinstance(error, kind)), "RuntimeError")
            passed = {"error": kind, "message": str(error), "errno": getattr(error, "errno", None)}
            args.merge.write_text(json.dumps(passed), encoding="utf-8")
            sys.exit(1)
        if not isinstance(error, (MergeError, ValueError, OSError)):
            raise
        sys.exit(str(error))
