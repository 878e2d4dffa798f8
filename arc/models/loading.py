"""Models of the pipeline: masks, vocabulary, loading, LoRA, saving.

Heavy libraries (torch, transformers, peft, unsloth) are imported inside the functions that need them, so that
`--help` is quick and so that Unsloth, where it is used, comes before the libraries it patches.
"""

from __future__ import annotations

import contextlib
import json
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.adapter_casts import cast_adapters_together
from arc.models.folded_lora import fold_lora
from arc.models.packing import IGNORE_INDEX, pack_rows
from arc.puzzles.dataset import find_reply_spans
from arc.runs.processes import process_count

if TYPE_CHECKING:
    import torch

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING_MODULES = ("embed_tokens", "lm_head")
# The characters that the text format needs, and the few more that upstream keeps (Source: ARChitects' run_finetuning).
KEPT_CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "!?.:,;*+/-=" + "\n"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|reserved_special_token_0|>", "<unk>")
MANIFEST = "manifest.json"


# ---------------------------------------------------------------------------------------------------------------------
# Masks


class InputMaskingDataCollator:
    """Pads rows into a batch and masks what is not to be learned.

    With `mask_inputs`, the labels keep the replies (with their end token) and mask everything else: the text before
    the first reply, every query and the padding. `mask_first_n_examples` masks that many leading replies as well: the
    rule of a puzzle cannot be known before its first pair has been seen. Without `mask_inputs` all tokens but the
    padding are learned.

    A row is a dict of one of two forms, with an optional "key" that names it in errors:

    - `{"input_ids": (tokens,), "reply_spans": (replies, 2)}`: spans count tokens, end exclusive, end token inside;
    - `{"text": str}`: tokenised here, the replies found in the text and carried over by character offsets. That is
      right for any vocabulary, also where digits and line breaks merge; a token belongs to a reply if it starts in it.

    A worked example with one token per character, "^" for BOS and "$" for the end: the row `^I1O2$I3O4$` has the
    `reply_spans` `[[4, 6], [9, 11]]`. Its labels are `.` (masked) and characters:

    >>> #  ^ I 1 O 2 $ I 3 O 4 $
    >>> #  . . . . 2 $ . . . 4 $    mask_first_n_examples=0
    >>> #  . . . . . . . . . 4 $    mask_first_n_examples=1

    Source: the ARChitects' collator of the same name, which searches token patterns and fails where an output is the
    only one left; this one is a plain class, works on spans and refuses rows that teach nothing.

    Args:
        tokenizer: a transformers tokenizer; its `pad_token_id` pads, and it tokenises rows that come as text.
        mask_inputs: learn replies only.
        mask_first_n_examples: leading replies of each row that are masked too (only with `mask_inputs`).
        pad_to_multiple_of: the batch's length, packed or not, is rounded up to a multiple of this.
        query_beg, reply_beg, reply_end: the text format, needed for rows that come as text.

    Attributes:
        packed_for: an engine: its batches are one row of several documents, without padding (see
            `packing_tools.pack_rows`); None, as made: rows are padded.
    """

    def __init__(
        self,
        tokenizer: Any,
        mask_inputs: bool = True,
        mask_first_n_examples: int = 0,
        pad_to_multiple_of: int = 8,
        query_beg: str = "I",
        reply_beg: str = "\n+/-=O",
        reply_end: str | None = None,
    ):
        """See the class."""
        self.packed_for: str | None = None
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token: load it with model_tools.load_tokenizer, which chooses one"
            )
        if mask_first_n_examples < 0 or pad_to_multiple_of < 1:
            raise ValueError(
                "expected mask_first_n_examples >= 0 and pad_to_multiple_of >= 1, "
                f"got {mask_first_n_examples} and {pad_to_multiple_of}"
            )
        if mask_first_n_examples and not mask_inputs:
            raise ValueError("mask_first_n_examples needs mask_inputs=True: without it nothing of a row is masked")
        self.tokenizer = tokenizer
        self.mask_inputs = mask_inputs
        self.mask_first_n_examples = mask_first_n_examples
        self.pad_to_multiple_of = pad_to_multiple_of
        self.query_beg = query_beg
        self.reply_beg = reply_beg
        self.reply_end = reply_end if reply_end is not None else "\n" + (tokenizer.eos_token or "")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of rows.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each int64 (rows, tokens), padded on the right; or see
            `packing_tools.pack_rows`.

        Raises:
            ValueError: a row has nothing to learn or is cut in the middle of a reply; it is named by its key.
        """
        import torch

        encoded = [self.encode(row) for row in rows]
        if self.packed_for is not None:
            return pack_rows(encoded, self.packed_for, self.tokenizer.pad_token_id, self.pad_to_multiple_of)
        longest = max(len(ids) for ids, _ in encoded)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
        for i, (ids, learned) in enumerate(encoded):
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
            labels[i, : len(ids)] = np.where(learned, ids, IGNORE_INDEX)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
        }

    def encode(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one row and which of them are learned: int64 (tokens,) and bool (tokens,).

        Raises:
            ValueError: as for a batch.
        """
        name = f"row {row['key']}" if row.get("key") is not None else "a row without a key"
        if row.get("filler"):  # see trainer_tools.FilledSamples
            return np.asarray(row["input_ids"], dtype=np.int64), np.zeros(len(row["input_ids"]), dtype=bool)
        if "input_ids" in row:
            ids = np.asarray(row["input_ids"], dtype=np.int64)
            if "reply_spans" not in row:
                raise ValueError(f"{name} has input_ids but no reply_spans: expected (replies, 2) token positions")
            spans = np.asarray(row["reply_spans"], dtype=np.int64).reshape(-1, 2)
        else:
            ids, spans = self._encode_text(row["text"], name)
        if len(spans) and spans[:, 1].max() > len(ids):
            raise ValueError(
                f"{name} is cut in the middle of a reply: the reply ends at token {spans[:, 1].max()}, the row after "
                f"{len(ids)}; raise --max_seq_length or let the loader drop demonstrations (get_task, max_tokens)"
            )
        if not self.mask_inputs:
            if not len(ids):
                raise ValueError(f"{name} is empty: nothing to learn")
            return ids, np.ones(len(ids), dtype=bool)
        learned = np.zeros(len(ids), dtype=bool)
        for begin, end in spans[self.mask_first_n_examples :]:
            learned[begin:end] = True
        if not learned.any():
            raise ValueError(
                f"{name} has nothing left to learn: {len(spans)} replies, of which the first "
                f"{self.mask_first_n_examples} are masked"
            )
        return ids, learned

    def _encode_text(self, text: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            characters = find_reply_spans(text, reply_beg=self.reply_beg, reply_end=self.reply_end)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        # Special tokens that the tokenizer adds (BOS) have the empty span (0, 0) and start in no reply.
        starts = np.where(offsets[:, 1] > offsets[:, 0], offsets[:, 0], -1)
        spans = []
        for begin, end in characters:
            inside = np.flatnonzero((starts >= begin) & (starts < end))
            if len(inside):
                spans.append((inside[0], inside[-1] + 1))
        return ids, np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def print_mask_report(
    rows: Sequence[dict[str, Any]],
    collator: InputMaskingDataCollator,
    *,
    lengths: np.ndarray,
    rows_per_epoch: int,
    epochs: float,
    seconds: float | None = None,
) -> None:
    """Print one row with what is learned and what is masked in two colours, and what an epoch holds.

    Args:
        rows: rows as the collator takes them; the first is shown, all are checked.
        collator: decides what is learned.
        lengths: token counts (rows,) of a sample of the epoch's rows.
        rows_per_epoch: how many rows an epoch has.
        epochs: how many epochs are trained (a part of one when steps are limited).
        seconds: estimated time of the training, if known.

    Raises:
        ValueError: a row that the collator refuses.
    """
    from rich.console import Console
    from rich.text import Text

    encoded = [collator.encode(row) for row in rows]
    ids, learned = encoded[0]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(ids)]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        piece = collator.tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        # Underlined as well as coloured: a log file or a pipe shows the brackets, a terminal the colours.
        text.append(f"⟦{piece}⟧" if learned[begin] else piece, style="bold green" if learned[begin] else "dim")
    console.print(Text("One sample: ") + Text("⟦learned⟧", "bold green") + Text(" and ") + Text("masked", "dim"))
    console.print(f"key {rows[0].get('key', '-')}")
    console.print(text)
    share = sum(int(mask.sum()) for _, mask in encoded) / sum(len(mask) for _, mask in encoded)
    console.print(f"learned: {share:.1%} of the tokens ({len(rows)} samples looked at)")
    counts, bounds = np.histogram(lengths, bins=min(8, max(1, len(np.unique(lengths)))))
    console.print(f"tokens a sample: mean {lengths.mean():.0f}, shortest {lengths.min()}, longest {lengths.max()}")
    for count, low, high in zip(counts, bounds[:-1], bounds[1:], strict=True):
        console.print(
            f"  {low:6.0f} to {high:6.0f}  {'█' * round(40 * count / counts.max())} {count / len(lengths):.1%}"
        )
    tokens = float(lengths.mean()) * rows_per_epoch
    time = "" if seconds is None else f"; estimated time: {format_duration(seconds)} (rough)"
    console.print(f"an epoch: {rows_per_epoch:,} samples, {tokens:,.0f} tokens; to train: {epochs:.3g} epochs{time}")


def format_duration(seconds: float) -> str:
    """Seconds as "1 h 02 min", "3 min 20 s" or "12 s"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s" if seconds >= 60 else f"{seconds:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, vocabulary, prepared base


def load_tokenizer(path: str | Path, pad_token: str | None = None) -> Any:
    """Load a fast tokenizer that pads on the right with a token that is not its end token.

    Args:
        path: a folder or a hub name.
        pad_token: the pad token; default: the tokenizer's own, else the first of `PAD_TOKENS` that it knows.

    Raises:
        ValueError: not a fast tokenizer, or nothing in it could pad. (Training pads with a token whose label is masked;
            with pad = EOS, many trainers would mask the end of replies as well.)
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception for whatever is wrong with a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"the tokenizer of {path} cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{path} has no tokenizer.json: expected a fast tokenizer")
    if pad_token is None and tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        pad_token = tokenizer.pad_token
    known = tokenizer.get_vocab()
    pad_token = pad_token or next((t for t in PAD_TOKENS if t in known and t != tokenizer.eos_token), None)
    if pad_token is None or pad_token not in known:
        raise ValueError(
            f"the tokenizer of {path} has no token to pad with: expected {pad_token or ' or '.join(PAD_TOKENS)}; add "
            "one with tokenizer.add_special_tokens and save it"
        )
    tokenizer.pad_token = pad_token
    tokenizer.padding_side = "right"
    return tokenizer


def cut_tokenizer(tokenizer: Any, keep_ids: Sequence[int] = ()) -> tuple[Any, list[int]]:
    """Cut a BPE tokenizer down to single characters, so that a grid cell is one token.

    Args:
        tokenizer: a fast tokenizer with a BPE model (Llama 3, GPT-2 and Llama 2 types were tried); not changed.
        keep_ids: further ids to keep, such as the end tokens that the model's configuration names.

    Returns:
        The new tokenizer, and the kept old ids in ascending order: new id i stands for old id kept[i].

    Raises:
        ValueError: not BPE, or a needed character is not a token of its own.

    Source: ARChitects' keep_single_char_tokens. It edits the tokenizer in place and leaves special tokens that no
    longer exist in its configuration; this one builds a new tokenizer from the cut tables and checks it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tables = json.loads(tokenizer.backend_tokenizer.to_str())
    if tables["model"]["type"] != "BPE":
        raise ValueError(
            f"cannot cut a {tables['model']['type']} vocabulary: expected BPE; keep it whole with --full_vocab true"
        )
    vocabulary = tables["model"]["vocab"]
    ids = {c: _character_id(c, vocabulary) for c in KEPT_CHARACTERS}
    missing = sorted(c for c, i in ids.items() if i is None)
    if missing:
        raise ValueError(f"the vocabulary has no token of its own for {missing}; keep it whole with --full_vocab true")
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *keep_ids]
    special += _post_processor_ids(tables.get("post_processor"))
    kept = sorted({*ids.values(), *(i for i in special if i is not None)})
    new_id = {old: new for new, old in enumerate(kept)}

    tables["model"]["vocab"] = {token: new_id[i] for token, i in vocabulary.items() if i in new_id}
    tables["model"]["merges"] = []
    tables["model"]["unk_token"] = None
    tables["added_tokens"] = [{**t, "id": new_id[t["id"]]} for t in tables["added_tokens"] if t["id"] in new_id]
    _post_processor_ids(tables.get("post_processor"), new_id)
    if not _is_byte_level(tables):
        # SentencePiece types prepend "▁" to the text: without its merges that would be an extra token.
        tables["normalizer"] = tables["pre_tokenizer"] = None
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tables)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    got = cut(KEPT_CHARACTERS, add_special_tokens=False)["input_ids"]
    if got != [new_id[ids[c]] for c in KEPT_CHARACTERS]:
        raise ValueError(
            "the cut vocabulary does not give one token per character; keep it whole with --full_vocab true"
        )
    return cut, kept


def _character_id(character: str, vocabulary: dict[str, int]) -> int | None:
    # Byte-level BPE writes "\n" as "Ċ" (byte 10 moved to U+010A); SentencePiece falls back to the byte token.
    names = ("Ċ", "\n", "<0x0A>") if character == "\n" else (character,)
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _is_byte_level(tables: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([tables.get("pre_tokenizer"), tables.get("decoder")])


def _post_processor_ids(node: Any, new_id: dict[int, int] | None = None) -> list[int]:
    # Template processors name the ids that they add: collect them, and renumber them when new_id is given.
    found: list[int] = []
    if isinstance(node, dict):
        for token in (node.get("special_tokens") or {}).values():
            found += token["ids"]
            if new_id is not None:
                token["ids"] = [new_id[i] for i in token["ids"]]
        for name in ("sep", "cls"):  # BertProcessing and RobertaProcessing: [token, id]
            if isinstance(node.get(name), list) and len(node[name]) == 2:
                found.append(node[name][1])
                if new_id is not None:
                    node[name][1] = new_id[node[name][1]]
        for value in node.values():
            found += _post_processor_ids(value, new_id)
    elif isinstance(node, list):
        for value in node:
            found += _post_processor_ids(value, new_id)
    return found


def config_token_ids(config: Any) -> list[int]:
    """All token ids that a model or generation configuration names (bos, eos, pad, ...)."""
    values = [value for name, value in config.to_dict().items() if name.endswith("token_id") and value is not None]
    return [i for value in values for i in (value if isinstance(value, list) else [value])]


def prepare_base(base_model: str | Path, out: str | Path, full_vocab: bool = False) -> dict[str, Any]:
    """Write the base that training starts from: 16-bit weights, a pad token, the vocabulary cut to what ARC needs.

    The kept tokens keep their embeddings, so their logits are those of the original model.

    Args:
        base_model: folder or hub name of an unquantised model.
        out: an existing folder, written into.
        full_vocab: keep the whole vocabulary.

    Returns:
        What was done, for the manifest: the base's name, vocabulary sizes before and after.

    Raises:
        ValueError: the base is quantised already, or its vocabulary cannot be cut.
        FileNotFoundError: no such model, or no access to it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_base(base_model)
    tokenizer = load_tokenizer(base_model)
    model = AutoModelForCausalLM.from_pretrained(
        str(base_model), dtype="auto", trust_remote_code=False, use_safetensors=True
    )
    if model.dtype == torch.float32:
        model = model.to(torch.bfloat16)
    before = len(tokenizer)
    # A base may name only a few of its special tokens in the tokenizer and more in its configurations.
    named = config_token_ids(model.config) + config_token_ids(model.generation_config)
    if not full_vocab:
        tokenizer, kept = cut_tokenizer(tokenizer, named)
        cut_embeddings(model, kept)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    # Greedy and sampled decoding stop at the end of a reply; sampling settings of a chat model do not belong here.
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    model.generation_config.do_sample = False
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return {"base_model": str(base_model), "vocabulary_before": before, "vocabulary": len(tokenizer)}


def check_base(base_model: str | Path) -> Any:
    """Return the configuration of a base model, or say what is wrong with it.

    Raises:
        ValueError: it is quantised already: cutting, LoRA and merging need the 16-bit weights.
        FileNotFoundError: it is not there, or is gated.
    """
    from transformers import AutoConfig

    folder = Path(base_model) if Path(base_model).is_dir() else None
    if folder is not None and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} is an adapter, not a model: name the -merged folder beside it")
        raise ValueError(f"{folder} holds no config.json: expected the folder of a model")
    try:
        config = AutoConfig.from_pretrained(str(base_model), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a bad configuration makes transformers raise
        if folder is not None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise ValueError(f"{folder / 'config.json'} is of no model that can be loaded ({reason})") from None
        if not isinstance(error, (OSError, ValueError)):
            raise
        gated = "gated" in str(error).lower() or "401" in str(error) or "403" in str(error)
        reason = "it is gated" if gated else "no such folder, and the hub does not give it"
        raise FileNotFoundError(
            f"cannot load the model {base_model}: {reason} ({str(error).strip().splitlines()[0][:120]}). Accept its "
            "licence on huggingface.co and run `hf auth login`, or name a local folder or an ungated 16-bit copy: "
            "--base_model FOLDER"
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        name = str(base_model)
        for suffix in ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit", "-4bit", "-8bit"):
            name = name.removesuffix(suffix)
        instead = name if name != str(base_model) else "the 16-bit model that it was made from"
        raise ValueError(
            f"{base_model} is quantised already; training quantises by itself. Name its 16-bit original: "
            f"--base_model {instead}"
        )
    return config


def cut_embeddings(model: Any, kept: Sequence[int]) -> None:
    """Keep the embedding rows `kept` (new id i = old id kept[i]) and renumber the configurations, in place."""
    import torch

    new_id = {old: new for new, old in enumerate(kept)}
    rows = torch.as_tensor(list(kept))
    with torch.no_grad():
        inputs = model.get_input_embeddings().weight[rows].clone()
        outputs = model.get_output_embeddings().weight[rows].clone()
        model.resize_token_embeddings(len(kept))
        model.get_input_embeddings().weight.copy_(inputs)
        model.get_output_embeddings().weight.copy_(outputs)
    for config in (model.config, model.generation_config):
        for name, value in config.to_dict().items():
            if name.endswith("token_id") and value is not None:
                setattr(config, name, [new_id[i] for i in value] if isinstance(value, list) else new_id[value])


# ---------------------------------------------------------------------------------------------------------------------
# Loading and LoRA


@dataclass(frozen=True)
class Precision:
    """How a base is loaded for training: what the merge must repeat.

    Args:
        engine: "unsloth" or "transformers".
        dtype: "bfloat16", "float16" or "float32": the type of the frozen weights and of the arithmetic.
        load_in_4bit: whether the frozen linear layers are quantised to 4-bit NormalFloat, with nested scales.
    """

    engine: str
    dtype: str
    load_in_4bit: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own."""
        import torch

        return getattr(torch, self.dtype)


def resolve_precision(engine: str = "auto", dtype: str = "auto", load_in_4bit: bool | None = None) -> Precision:
    """Choose engine and number formats for this machine.

    `auto` is Unsloth in 4 bits where there is CUDA and transformers where there is none; bf16 where the card has it,
    else fp16 (such as on a T4); float32 on a CPU.

    Raises:
        ValueError: Unsloth was asked for and cannot run here.
    """
    import importlib.util

    import torch

    cuda = torch.cuda.is_available()
    has_unsloth = importlib.util.find_spec("unsloth") is not None
    if engine == "auto":
        engine = "unsloth" if cuda else "transformers"
    if engine == "unsloth" and not (cuda and has_unsloth):
        why = "no CUDA device is seen" if not cuda else "it is not installed (pip install -r requirements.txt)"
        raise ValueError(f"--engine unsloth cannot run here: {why}; use --engine transformers")
    if dtype == "auto":
        dtype = (
            ("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16")
            if cuda
            else "float32"
        )
    if engine == "unsloth" and dtype == "float32":
        raise ValueError("--engine unsloth trains in bfloat16 or float16, not float32")
    return Precision(engine, dtype, engine == "unsloth" if load_in_4bit is None else load_in_4bit)


def quantization_config(precision: Precision) -> Any:
    """The 4-bit settings of the published recipe (and Unsloth's own): NF4, nested scales, 16-bit arithmetic."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision.torch_dtype,
    )


def load_model(
    path: str | Path, precision: Precision, max_seq_length: int = 2048, vllm_rank: int | None = None
) -> tuple[Any, Any]:
    """Load a 16-bit model folder for training or decoding, quantised if `precision` says so.

    Args:
        path: a `-prepared` or `-merged` folder.
        precision: engine and formats, see `resolve_precision`.
        max_seq_length: the longest row in tokens (Unsloth sizes its tables by it).
        vllm_rank: rank of the LoRA with which Unsloth's vLLM shall sample; None: without vLLM. Only for Unsloth.

    Returns:
        The model, on the first CUDA device if there is one, and the folder's tokenizer.
    """
    tokenizer = load_tokenizer(path)
    if precision.engine == "unsloth":
        import torch
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(path),
            max_seq_length=max_seq_length,
            dtype=precision.torch_dtype,
            load_in_4bit=precision.load_in_4bit,
            trust_remote_code=False,
            **({"device_map": {"": torch.cuda.current_device()}} if process_count() > 1 else {}),
            **({"fast_inference": True, "max_lora_rank": vllm_rank} if vllm_rank else {}),
        )
    else:
        model = _load_transformers(path, precision)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_transformers(path: str | Path, precision: Precision) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # Each of several processes has a GPU of its own.
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    quantised = {"quantization_config": quantization_config(precision)} if precision.load_in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(
        str(path),
        dtype=precision.torch_dtype,
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
        **quantised,
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 the first forward pass repacks 4-bit weights and later gradients are wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_lora(
    model: Any,
    precision: Precision,
    *,
    target_modules: Sequence[str] = LINEAR_MODULES + EMBEDDING_MODULES,
    r: int = 512,
    lora_alpha: float = 24,
    lora_dropout: float = 0.0,
    bias: str = "none",
    use_rslora: bool = True,
    random_state: int = 42,
    max_seq_length: int = 2048,
    gradient_checkpointing: bool = True,
    fold: bool = False,
    cast_together: bool = True,
) -> Any:
    """Add LoRA to the linear layers and make the embeddings trainable in full.

    `embed_tokens` and `lm_head` among the targets become full matrices (`r` does not apply to them), as Unsloth does:
    one shared matrix where the model is tied. All trainable weights are float32: in bfloat16 most updates of an
    embedding at a rate of 1e-5 would round to nothing.

    Args:
        model: as `load_model` gives it.
        precision: the same.
        target_modules: names of linear layers, and "embed_tokens", "lm_head".
        r, lora_alpha, lora_dropout, bias, use_rslora: see peft.LoraConfig; rsLoRA scales by alpha / sqrt(r).
        random_state: seed of the initial values.
        max_seq_length: the longest row in tokens.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        fold: add LoRA's matrices to the weights before they multiply, see folded_lora.
        cast_together: on the Unsloth engine, share one cast of all adapters, see adapter_casts; for measurements
            without: the numbers are the same.

    Returns:
        A peft model.

    Raises:
        ValueError: layers that cannot be folded.
    """
    import torch

    full = [name for name in EMBEDDING_MODULES if name in target_modules]
    linear = [name for name in target_modules if name not in EMBEDDING_MODULES]
    tied = bool(model.config.tie_word_embeddings)
    lora = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "bias": bias, "use_rslora": use_rslora}
    if precision.engine == "unsloth":
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            model,
            target_modules=list(target_modules),
            use_gradient_checkpointing=gradient_checkpointing,
            random_state=random_state,
            max_seq_length=max_seq_length,
            loftq_config=None,
            **lora,
        )
    else:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(random_state)
        model = get_peft_model(
            model,
            LoraConfig(
                target_modules=linear,
                modules_to_save=(["embed_tokens"] if tied and full else full) or None,
                ensure_weight_tying=tied and bool(full),
                task_type="CAUSAL_LM",
                **lora,
            ),
        )
    train_in_float32(model)
    if precision.engine == "transformers":
        _match_embedding_dtypes(model, precision.torch_dtype)
    elif cast_together:
        cast_adapters_together(model, precision.torch_dtype)
    if fold:
        fold_lora(model)
    return model


def train_in_float32(model: Any) -> None:
    """Make every trainable weight float32, in place, keeping tied ones tied."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _match_embedding_dtypes(model: Any, dtype: torch.dtype) -> None:
    # A float32 embedding between 16-bit layers: its output is rounded to their type, the head's input widened to its.
    import torch

    if dtype == torch.float32:
        return

    def narrow(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    def widen(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].to(module.weight.dtype), *args[1:])

    model.get_input_embeddings().register_forward_hook(narrow)
    head = model.get_output_embeddings()
    getattr(head, "modules_to_save", {"default": head})["default"].register_forward_pre_hook(widen)


def set_gradient_checkpointing(model: Any, engine: str, on: bool) -> None:
    """Have a model in training recompute activations in the backward pass, which saves memory, or keep them.

    Args:
        model: a peft model.
        engine: "unsloth" or "transformers".
        on: recompute.
    """
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        model._unsloth_gradient_checkpointing = on  # what it goes back to after decoding
        FastLanguageModel.for_training(model, use_gradient_checkpointing=on)
    elif on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def decoding(model: Any, engine: str) -> Iterator[Any]:
    """Switch a model in training to decoding and back: evaluation mode, no checkpointing, no compiled layers.

    And no attention by cuDNN, which PyTorch prefers on Hopper GPUs: it makes a plan for each length, and with each
    token of a reply comes another length.
    """
    import torch

    was_training = model.training
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    else:
        model.eval()
    checkpointed = engine == "transformers" and getattr(model, "is_gradient_checkpointing", False)
    if checkpointed:
        model.gradient_checkpointing_disable()
    # Layers that were compiled for training would be compiled anew for every kind of pass over a cache.
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    by_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.no_grad():
            yield model
    finally:
        torch.backends.cuda.enable_cudnn_sdp(by_cudnn)
        for module, call in compiled.items():
            module._compiled_call_impl = call
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if was_training:
            if engine == "unsloth":
                FastLanguageModel.for_training(model)
            else:
                model.train()


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact, or an empty dict if it has none.

    Raises:
        ValueError: it is there and cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} cannot be read (it holds a {type(manifest).__name__})")
    for name in ("files", "made_from", "settings", "precision", "check"):
        if not isinstance(manifest.get(name, {}), dict):
            raise ValueError(f"{path} cannot be read ({name} is no object)")
    for name, entry in manifest.get("files", {}).items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "mtime_ns", "sha256"}:
            raise ValueError(f"{path} cannot be read (its entry of {name})")
    return manifest


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write what an artifact is and how it was made."""
    text = json.dumps(manifest, indent=2, sort_keys=True, default=str, allow_nan=False)
    (Path(folder) / MANIFEST).write_text(text + "\n", encoding="utf-8")


def save_adapter(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    base: str | Path,
    precision: Precision,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Save adapter, tokenizer and manifest into a folder.

    Args:
        model: a peft model.
        tokenizer: the tokenizer that it was trained with.
        path: an existing folder.
        base: the folder that the adapter was trained on; written into adapter_config.json, so that plain peft finds it.
        precision: how that base was loaded in training; a merge onto the quantised base repeats it.
        manifest: what else to record.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = absolute_reference(base)
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # a set's order differs from process to process
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)  # how it was loaded is no part of what it is
    # "auto" would guess from the base's vocabulary whether to save the embeddings: modules_to_save says so already.
    model.save_pretrained(str(path), save_embedding_layers=False)
    tokenizer.save_pretrained(str(path))
    how = {"base": absolute_reference(base), "precision": asdict(precision)}
    if precision.load_in_4bit:
        # For whoever loads it without this pipeline: transformers.BitsAndBytesConfig(**quantization).
        recorded = quantization_config(precision).to_dict()
        how["quantization"] = {name: recorded[name] for name in recorded if name.startswith(("load_in_4", "bnb_4"))}
    write_manifest(path, {**(manifest or {}), **how})


def absolute_reference(model: str | Path) -> str:
    """A model's folder by its absolute path, so that what names it loads from anywhere; a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def load_adapter(model: Any, path: str | Path) -> Any:
    """Put a saved adapter, to be used and not trained further, onto a base that `load_model` loaded.

    Any engine's adapter goes onto any engine's base.

    Raises:
        ValueError: no adapter, or its matrices do not fit the base (another size or vocabulary).
    """
    from peft import PeftModel

    if not (Path(path) / "adapter_model.safetensors").is_file():  # peft would look for a pickle instead
        raise ValueError(f"{path} has no adapter_model.safetensors: expected the folder of an adapter")
    try:
        # Read on the CPU: beside a model in float32, a card of 8 GB has no room for a second copy of whole matrices.
        return PeftModel.from_pretrained(model, str(path), is_trainable=False, torch_device="cpu")
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"the adapter {path} was trained on another base: {str(error).splitlines()[-1].strip()}"
        ) from None
