"""Vocabulary: tokenizers, and the cut to one token per grid cell."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The characters of the text format, and a few more as upstream (Source: ARChitects' run_finetuning).
KEPT_CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "!?.:,;*+/-=" + "\n"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|reserved_special_token_0|>", "<unk>")


def load_tokenizer(path: str | Path) -> Any:
    """Load a fast tokenizer, from a folder or the hub, that pads on the right with a token that is not its end token.

    With pad = EOS, many trainers would mask the end of replies together with the padding.

    Raises:
        ValueError: not a fast tokenizer, or without a token that could pad.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception for whatever is wrong with a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"the tokenizer of {path} cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{path} has no tokenizer.json: expected a fast tokenizer")
    vocabulary, pad_token = tokenizer.get_vocab(), tokenizer.pad_token
    if pad_token is None or pad_token == tokenizer.eos_token:
        pad_token = next((token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token), None)
    if pad_token not in vocabulary:
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
        The new tokenizer, and the old ids that stay, ascending: new id i stands for old id old_ids[i].

    Raises:
        ValueError: not BPE, or a needed character is not a token of its own.

    Source: ARChitects' keep_single_char_tokens. It edits the tokenizer in place, and its configuration keeps special
    tokens that no longer exist. This one builds a new tokenizer from the cut tables and checks it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tables = json.loads(tokenizer.backend_tokenizer.to_str())
    if tables["model"]["type"] != "BPE":
        raise ValueError(
            f"cannot cut a {tables['model']['type']} vocabulary: expected BPE; keep it whole with --full_vocab true"
        )
    vocabulary = tables["model"]["vocab"]
    # Byte-level BPE writes "\n" as "Ċ" (byte 10 moved to U+010A); SentencePiece falls back to the byte token.
    newline = next((vocabulary[name] for name in ("Ċ", "\n", "<0x0A>") if name in vocabulary), None)
    ids = {c: newline if c == "\n" else vocabulary.get(c) for c in KEPT_CHARACTERS}
    missing = sorted(c for c, i in ids.items() if i is None)
    if missing:
        raise ValueError(f"the vocabulary has no token of its own for {missing}; keep it whole with --full_vocab true")
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *keep_ids]
    special += _post_processor_ids(tables.get("post_processor"))
    old_ids = sorted({*ids.values(), *(i for i in special if i is not None)})
    new_id = {old: new for new, old in enumerate(old_ids)}

    tables["model"]["vocab"] = {token: new_id[i] for token, i in vocabulary.items() if i in new_id}
    tables["model"]["merges"] = []
    tables["model"]["unk_token"] = None
    tables["added_tokens"] = [{**t, "id": new_id[t["id"]]} for t in tables["added_tokens"] if t["id"] in new_id]
    _post_processor_ids(tables.get("post_processor"), new_id)
    if "ByteLevel" not in json.dumps([tables.get("pre_tokenizer"), tables.get("decoder")]):
        # SentencePiece types prepend "▁" to the text: without its merges that would be an extra token.
        tables["normalizer"] = tables["pre_tokenizer"] = None
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tables)), bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token, model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip
    if cut(KEPT_CHARACTERS, add_special_tokens=False)["input_ids"] != [new_id[ids[c]] for c in KEPT_CHARACTERS]:
        raise ValueError(
            "the cut vocabulary does not give one token per character; keep it whole with --full_vocab true"
        )
    return cut, old_ids


def _post_processor_ids(node: Any, new_id: dict[int, int] | None = None) -> list[int]:
    # The ids that template processors add; they are renumbered in place if new_id is given.
    ids: list[int] = []
    if isinstance(node, dict):
        for token in (node.get("special_tokens") or {}).values():
            ids += token["ids"]
            if new_id is not None:
                token["ids"] = [new_id[i] for i in token["ids"]]
        for name in ("sep", "cls"):  # BertProcessing and RobertaProcessing: [token, id]
            if isinstance(node.get(name), list) and len(node[name]) == 2:
                ids.append(node[name][1])
                if new_id is not None:
                    node[name][1] = new_id[node[name][1]]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        ids += _post_processor_ids(child, new_id)
    return ids
