"""The collator: batches of token ids whose labels hide what is not to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.packing import IGNORE_INDEX, pack_rows
from arc.models.prompt_sharing import round_up
from arc.puzzles.text import find_reply_spans

if TYPE_CHECKING:
    import torch


class InputMaskingDataCollator:
    """Pads rows into a batch and masks what is not to be learned.

    With `mask_inputs`, the labels keep the replies (with their end token) and mask everything else. Without it all
    tokens but the padding are learned. `mask_first_n_examples` masks leading replies as well: the rule of a puzzle
    cannot be known before its first pair has been seen.

    A row is a dict of one of two forms, with an optional "key" that names it in errors:

    - `{"input_ids": (tokens,), "reply_spans": (replies, 2)}`: spans count tokens, end exclusive, end token inside;
    - `{"text": str}`: tokenised here, with any vocabulary. A token belongs to a reply if it starts in it.

    Example with one token per character, "^" for BOS and "$" for the end: the row `^I1O2$I3O4$` has the `reply_spans`
    `[[4, 6], [9, 11]]`. Its labels are `.` (masked) and characters:

    >>> #  ^ I 1 O 2 $ I 3 O 4 $
    >>> #  . . . . 2 $ . . . 4 $    mask_first_n_examples=0
    >>> #  . . . . . . . . . 4 $    mask_first_n_examples=1

    Args:
        tokenizer: of transformers, with a pad token.
        mask_inputs: learn replies only.
        mask_first_n_examples: leading replies of each row that are masked too (only with `mask_inputs`).
        pad_to_multiple_of: the batch's length, packed or not, is rounded up to a multiple of this.
        query_beg, reply_beg, reply_end: the text format, for rows that come as text; `query_beg` is not used.

    Source: the ARChitects' collator of the same name. It searches token patterns and fails where only one output is
    left; this one works on spans and refuses rows without anything to learn.
    """

    def __init__(
        self, tokenizer: Any, mask_inputs: bool = True, mask_first_n_examples: int = 0, pad_to_multiple_of: int = 8,
        query_beg: str = "I", reply_beg: str = "\n+/-=O", reply_end: str | None = None,
    ):  # fmt: skip
        self.packed_for: str | None = None  # None: rows are padded; an engine: one row, see `packing.pack_rows`
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token: load it with model_tools.load_tokenizer, which chooses one"
            )
        if mask_first_n_examples < 0 or pad_to_multiple_of < 1:
            values = f"{mask_first_n_examples} and {pad_to_multiple_of}"
            raise ValueError(f"expected mask_first_n_examples >= 0 and pad_to_multiple_of >= 1, got {values}")
        if mask_first_n_examples and not mask_inputs:
            raise ValueError("mask_first_n_examples needs mask_inputs=True: without it nothing of a row is masked")
        self.tokenizer = tokenizer
        self.mask_inputs = mask_inputs
        self.mask_first_n_examples, self.pad_to_multiple_of = mask_first_n_examples, pad_to_multiple_of
        self.reply_beg = reply_beg
        self.reply_end = reply_end if reply_end is not None else "\n" + (tokenizer.eos_token or "")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of rows.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each int64 (rows, tokens), padded on the right; packed: see
            `packing.pack_rows`.

        Raises:
            ValueError: a row has nothing to learn or ends in the middle of a reply.
        """
        import torch

        encoded = [self.encode(row) for row in rows]
        if self.packed_for is not None:
            return pack_rows(encoded, self.packed_for, self.tokenizer.pad_token_id, self.pad_to_multiple_of)
        width = round_up(max(len(ids) for ids, _ in encoded), self.pad_to_multiple_of)
        fillers = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch = {name: np.full((len(rows), width), filler, dtype=np.int64) for name, filler in fillers.items()}
        for i, (ids, learned) in enumerate(encoded):
            batch["input_ids"][i, : len(ids)] = ids
            batch["attention_mask"][i, : len(ids)] = 1
            batch["labels"][i, : len(ids)] = np.where(learned, ids, IGNORE_INDEX)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def encode(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one row and which of them are learned, int64 and bool (tokens,); raises as for a batch."""
        name = f"row {row['key']}" if row.get("key") is not None else "a row without a key"
        if row.get("filler"):  # of training: it makes batches of all processes equally long
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
            replies = f"{len(spans)} replies, of which the first {self.mask_first_n_examples} are masked"
            raise ValueError(f"{name} has nothing left to learn: {replies}")
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
