"""Merge an adapter into its base, and prove the merge.

    python merge_tools.py output/Llama-3.2-1B-Base-lora output/Llama-3.2-1B-Base-merged

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
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc_loader import ArcDataset, format_options
from arc_samples import SampleEncoder
from inference_tools import generate_replies
from model_tools import (
    KEPT_CHARACTERS,
    MANIFEST,
    Precision,
    decoding,
    format_duration,
    load_adapter,
    load_model,
    load_tokenizer,
    read_manifest,
)

if TYPE_CHECKING:
    import torch

PROBE = "probe.safetensors"
PROBE_POSITIONS = 32  # of each row, at most
PROBE_BYTES = 15 * 2**20  # of its log probabilities
# Operations that one pass over the probe may take: about 20 s in float32 on a slow machine of its kind.
PROBE_OPERATIONS = {"cuda": 2e14, "cpu": 1e12}
LOGIT_BYTES = 2**27  # of a batch's logits

DRAWS = 2  # random errors of rounding that are tried, see `check_behaviour`
KL_FACTOR = 4.0
KL_FLOOR = 1e-8  # nats a token; two orders of summation in float32 are less than 1e-10 apart

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


def _plan_merge(
    adapter: str | Path, base: str | Path | None, merge_base: str, precision: Precision | None
) -> _Plan:
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
        answers = _answers(model, probe, all_logits=engine == "unsloth")
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
    return 2 * sum(p.numel() for p in model.parameters()), PROBE_OPERATIONS[next(model.parameters()).device.type]


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


def _answers(model: Any, probe: Probe, all_logits: bool = False) -> torch.Tensor:
    """Log probabilities of the next token at the probe's positions, float64 (rows, positions, vocabulary), on the CPU."""
    import torch

    return torch.stack(_log_probabilities(model, probe.rows, list(probe.positions), all_logits))


def _log_probabilities(
    model: Any, rows: Sequence[np.ndarray], wanted: Sequence[np.ndarray], all_logits: bool = False
) -> list[torch.Tensor]:
    # float64 (positions, vocabulary) of each row. Padding is on the right, where no token of a row can see it. The
    # head is applied where it is needed only (a whole vocabulary's logits take gigabytes), if the engine can do so.
    import torch

    found: list[torch.Tensor | None] = [None] * len(rows)
    device, vocabulary = next(model.parameters()).device, model.config.vocab_size
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
            kept = np.arange(ids.shape[1]) if all_logits else np.unique(np.concatenate([wanted[i] for i in batch]))
            some = {} if all_logits else {"logits_to_keep": torch.from_numpy(kept).to(device)}
            logits = model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                use_cache=False,
                **some,
            ).logits
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
                self._full.setdefault(self._place(name, tensor), tensor)
        tied = {self._embedding, self._head} if self._tied else set()
        if tied & set(self._low_rank):
            raise MergeError(
                f"{self.adapter} has a low-rank change of one of two tied matrices ({self._embedding}): a tied model "
                "cannot hold the sum; untie the base before training, or train the matrix in full"
            )
        incomplete = [name for name, parts in self._low_rank.items() if len(parts) != 2]
        if incomplete:
            raise MergeError(f"{self.adapter} has half of a low-rank change only for {incomplete[0]}")

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
        import torch
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
                    shape = [left.shape[0], right.shape[1]]
                    raise MergeError(f"the change of {name} in {self.adapter} is {shape}, the base's {list(base.shape)}")
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
    # frexp gives x = m * 2**exponent with m in [0.5, 1), so that x's binade begins at 2**(exponent - 1).
    lowest = round(math.log2(numbers.smallest_normal))
    return torch.ldexp(torch.full_like(x, numbers.eps / 2), (exponent - 1).clamp(min=lowest))


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
        `weights` (how many), `largest_weight_error` in half ulps of the stored type and `largest_weight_error_in`.

    Raises:
        MergeError: a tensor is missing, left over, of another shape, not of a floating type, or off; the worst is named.
    """
    import torch
    from transformers import AutoConfig

    stored, expected = _Stored(merged), _Sum(model, adapter)
    tied = AutoConfig.from_pretrained(str(merged), trust_remote_code=False).tie_word_embeddings
    if bool(tied) != bool(model.config.tie_word_embeddings):
        words = {True: "tied", False: "untied"}
        raise MergeError(
            f"the embeddings of {merged} are {words[bool(tied)]} by its config.json, those of the base are "
            f"{words[bool(model.config.tie_word_embeddings)]}"
        )
    for what, names in (
        ("lacks", sorted(set(expected.base) - stored.names())),
        ("holds, beyond the base's,", sorted(stored.names() - set(expected.base))),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise MergeError(f"{merged} {what} the tensor {names[0]}{more}")
    largest, largest_name, worst, off, weights = 0.0, None, None, 0, 0
    for name, base in expected.base.items():
        part = stored.slice(name)
        if list(part.get_shape()) != list(base.shape):
            raise MergeError(f"{name} of {merged} is {part.get_shape()}, expected {list(base.shape)}")
        weights += base.numel()
        for rows, total, slack in expected.blocks(name):
            saved = part[rows].to(total.device)
            if not saved.dtype.is_floating_point:
                raise MergeError(f"{name} of {merged} is stored as {saved.dtype}, expected a floating type")
            step = half_ulp(total, saved.dtype)
            error = (saved.double() - total).abs()
            # What is not a number is further off than anything.
            beyond = torch.nan_to_num(error / (step + slack), nan=math.inf, posinf=math.inf)
            off += int((beyond > 1).sum())
            at = int(beyond.argmax())
            if worst is None or float(beyond.flatten()[at]) > worst[0]:
                place = [int(i) for i in np.unravel_index(at, beyond.shape)]
                place[0] += rows.start or 0
                found = [float(tensor.flatten()[at]) for tensor in (beyond, saved, total, error / step)]
                worst = (found[0], name, place, *found[1:], str(saved.dtype)[6:])
            in_steps = float(torch.nan_to_num(error / step, nan=math.inf, posinf=math.inf).max())
            if in_steps > largest or largest_name is None:
                largest, largest_name = in_steps, name
    assert worst is not None
    if off:
        _, name, place, saved, total, steps, dtype = worst
        why = f" ({dtype} holds numbers up to {torch.finfo(getattr(torch, dtype)).max:g})" if math.isinf(saved) else ""
        raise MergeError(
            f"{name}{place} of {merged} is {saved:.6g}{why}, base + adapter is {total:.6g}: off by {steps:.3g} half "
            f"ulps of {dtype}, where rounding explains 1; {off:,} of {weights:,} weights are beyond that"
        )
    return {"weights": weights, "largest_weight_error": largest, "largest_weight_error_in": largest_name}


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour


def check_behaviour(
    model: Any, adapter: str | Path, merged: str | Path, probe: Probe, *, factor: float = KL_FACTOR
) -> dict[str, Any]:
    """Prove that a merged model answers as base + adapter does, up to what rounding its weights explains.

    TODO

    Args:
        model: the merge base, as `load_merge_base` gives it; it is used up and left without weights, to make room.
        adapter: a `-lora` folder.
        merged: the folder of the merged model.
        probe: what to ask.
        factor: see above.

    Returns:
        TODO

    Raises:
        MergeError: the merge cannot be loaded whole by plain transformers, or answers otherwise.
    """
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(merged), trust_remote_code=False).dtype or torch.float32
    device = next(model.parameters()).device
    model.eval()
    untrained = _answers(model, probe)
    # The adapter as it is, on the base as it is: what the merge must answer as.
    adapted = load_adapter(model, adapter).eval()
    for module in adapted.modules():
        if hasattr(module, "modules_to_save"):
            module.original_module.to("meta")  # a whole embedding that would only take room
    reference = _answers(adapted, probe)
    if not torch.isfinite(reference).all():
        raise MergeError(f"base + {adapter} answers with numbers that are not finite")
    # The same sum as plain weights, to be moved by errors of rounding.
    plain = adapted.unload()
    del adapted
    _write_sum(plain, adapter)
    noise = _divergence(reference, _answers(plain, probe))
    if not noise <= KL_FLOOR:
        raise MergeError(
            f"the weights that the files of {adapter} add up to are {noise:.3g} nats a token from what peft makes of "
            f"them, expected at most {KL_FLOOR:.3g}"
        )
    draws, names = [], _rounded_names(plain, dtype)
    for seed in range(DRAWS):
        _move_weights(plain, names, dtype, seed, 1)
        draws.append(_divergence(reference, _answers(plain, probe)))
        _move_weights(plain, names, dtype, seed, -1)
    _round_weights(plain, dtype)
    rounding = _divergence(reference, _answers(plain, probe))
    plain.to("meta")
    if device.type == "cuda":
        torch.cuda.empty_cache()

    loaded = _load_merged(merged, device)
    answers = _answers(loaded, probe)
    if answers.shape != reference.shape:
        raise MergeError(f"{merged} has {answers.shape[-1]:,} tokens, base + adapter {reference.shape[-1]:,}")
    kl = _divergence(reference, answers)
    bound = factor * max(draws) + KL_FLOOR
    result = {
        "prompts": len(probe.rows),
        "positions": int(probe.positions.size),
        "kl": kl,
        "kl_bound": bound,
        "kl_draws": draws,
        "kl_rounding": rounding,
        "adapter_kl": _divergence(reference, untrained),
        "top1": _same_choice(reference, answers),
    }

    if not kl <= bound:
        raise MergeError("TODO")
    return {**result, **_compare_with_trained(loaded, answers, probe)}


def _write_sum(model: Any, adapter: str | Path) -> None:
    import torch

    expected = _Sum(model, adapter)
    with torch.no_grad():
        for name in expected.base:
            for rows, total, _ in expected.blocks(name):
                expected.base[name][rows] = total
    if model.config.tie_word_embeddings:
        model.tie_weights()


def _rounded_names(model: Any, dtype: torch.dtype) -> list[str]:
    # Tensors that `dtype` does not hold exactly.
    return [
        name
        for name, tensor in state_without_ties(model).items()
        if any(not bool((tensor[rows].to(dtype) == tensor[rows]).all()) for rows in _blocks(tensor))
    ]


def _move_weights(model: Any, names: Sequence[str], dtype: torch.dtype, seed: int, sign: int) -> None:
    # Each weight by an error of its own, evenly distributed over half an ulp of `dtype` either way; with sign -1 the
    # same errors are taken back (up to float32's rounding; where a binade is crossed, up to the error itself).
    import torch

    state = state_without_ties(model)
    for number, name in enumerate(names):
        generator = torch.Generator(state[name].device).manual_seed(1000 * seed + number)
        for rows in _blocks(state[name]):
            part = state[name][rows]
            errors = torch.rand(part.shape, generator=generator, device=part.device).mul_(2).sub_(1)
            part += sign * errors * half_ulp(part, dtype)


def _round_weights(model: Any, dtype: torch.dtype) -> None:
    for tensor in state_without_ties(model).values():
        for rows in _blocks(tensor):
            tensor[rows] = tensor[rows].to(dtype).to(tensor.dtype)


def _load_merged(merged: str | Path, device: Any) -> Any:
    import torch
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
    except (RuntimeError, OSError, ValueError) as error:
        raise MergeError(f"plain transformers cannot load {merged}: {str(error).strip().splitlines()[-1]}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(name) for name in report.get(what) or [])
        if found:
            raise MergeError(f"{merged} loads with {what.replace('_', ' ')}: {', '.join(found[:3])}")
    return model.eval()


def _compare_with_trained(model, answers, probe):
    return {}
