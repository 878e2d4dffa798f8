"""InputMaskingDataCollator against literal tables. One character is one token; "." in a table is a masked label."""

import re

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from arc.models.collator import InputMaskingDataCollator
from arc.models.packing import IGNORE_INDEX

BOS, END, PAD = "^", "$", "_"


def character_tokenizer(merges=()):
    """One token per character, and the given merges of digits; "^" is added in front."""
    characters = "ABIO0123456789\n+/-=" + BOS + END + PAD
    vocabulary = {token: i for i, token in enumerate([*characters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\d{1,3}|\D"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD)


TOKENIZER = character_tokenizer()
FORMAT = {"query_beg": "I", "reply_beg": "O", "reply_end": END}


def row(text, key="puzzle_0"):
    """A row with token spans, the replies found as O...$ by a regular expression of the test's own."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    spans = [(m.start() + 1, m.end()) for m in re.finditer(r"O[^$]*\$", text)]
    return {"key": key, "input_ids": np.array(ids, dtype=np.int32), "reply_spans": np.array(spans, dtype=np.int32)}


def labels_as_text(labels):
    return "".join("." if i == IGNORE_INDEX else TOKENIZER.convert_ids_to_tokens(i) for i in labels.tolist())


TABLE = [
    # text                  masked examples   labels
    ("^AI1O2$I3O4$", 0, "....." "2$" "..." "4$"),
    ("^AI1O2$I3O4$", 1, ".........." "4$"),
    ("^AI12O345$", 0, "......" "345$"),
    ("^I1O2$I3O4$I5O6$", 2, ".............." "6$"),
    ("^I1O2$I3O", 0, "....2$..."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "masked", "expected"), TABLE)
def test_labels_of_one_row(text, masked, expected):
    collator = InputMaskingDataCollator(TOKENIZER, mask_first_n_examples=masked, pad_to_multiple_of=1)
    batch = collator([row(text)])
    assert labels_as_text(batch["labels"][0]) == expected
    assert batch["input_ids"][0].tolist() == row(text)["input_ids"].tolist()


def test_a_batch_is_padded_on_the_right_to_a_multiple():
    batch = InputMaskingDataCollator(TOKENIZER, pad_to_multiple_of=8)([row("^I1O2$"), row("^I1O2$I3O45$")])
    ids = [TOKENIZER.convert_ids_to_tokens(r) for r in batch["input_ids"].tolist()]
    assert ["".join(r) for r in ids] == ["^I1O2$__________", "^I1O2$I3O45$____"]
    assert [labels_as_text(r) for r in batch["labels"]] == ["....2$..........", "....2$...45$...."]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 10, [1] * 12 + [0] * 4]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, (2, 16))
    )


def test_without_masking_all_but_the_padding_is_learned():
    batch = InputMaskingDataCollator(TOKENIZER, mask_inputs=False, pad_to_multiple_of=8)([row("^AI1O2$")])
    assert labels_as_text(batch["labels"][0]) == "^AI1O2$."


def test_a_pad_token_inside_the_text_is_learned_like_any_other():
    # Masks come from positions, never from the value of a token.
    ids = TOKENIZER("^I1O2_$", add_special_tokens=False)["input_ids"]
    batch = InputMaskingDataCollator(TOKENIZER, pad_to_multiple_of=1)([{"input_ids": ids, "reply_spans": [[4, 7]]}])
    assert labels_as_text(batch["labels"][0]) == "....2_$"


@pytest.mark.parametrize("merges", [(), (("1", "2"), ("12", "3"), ("4", "5"))])
def test_rows_of_text_are_masked_by_offsets_also_where_digits_merge(merges):
    tokenizer = character_tokenizer(merges)
    collator = InputMaskingDataCollator(tokenizer, pad_to_multiple_of=1, **FORMAT)
    batch = collator([{"key": "a_0", "text": "AI123\n45O45\n123$I1O12$"}])
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    learned = [
        t if label != IGNORE_INDEX else "." for t, label in zip(tokens, batch["labels"][0].tolist(), strict=True)
    ]
    expected = {
        (): ["."] * 10 + ["4", "5", "\n", "1", "2", "3", "$"] + ["."] * 3 + ["1", "2", "$"],
    }.get(merges, ["."] * 7 + ["45", "\n", "123", "$"] + ["."] * 3 + ["12", "$"])
    assert tokens[0] == BOS
    assert learned == expected


def test_text_and_spans_give_the_same_batch():
    collator = InputMaskingDataCollator(TOKENIZER, mask_first_n_examples=1, **FORMAT)
    from_text, from_spans = collator([{"text": "AI1O2$I3O4$"}]), collator([row("^AI1O2$I3O4$")])
    assert all(torch.equal(from_text[name], from_spans[name]) for name in from_spans)


@pytest.mark.parametrize(
    ("bad", "masked", "message"),
    [
        (row("^AI1", key="007bbfb7-000_0.tp"), 0, "007bbfb7-000_0.tp has nothing left to learn: 0 replies"),
        (row("^I1O2$", key="x_0"), 1, "x_0 has nothing left to learn: 1 replies, of which the first 1"),
        ({**row("^I1O2$I3O4$", key="y_0"), "input_ids": row("^I1O2$I3O")["input_ids"]}, 0, "y_0 is cut in the middle"),
        ({"key": "z_0", "text": "I1O2$I3O4"}, 0, "z_0: .*cut in the middle of a reply"),
        ({"key": "w_0", "input_ids": [1, 2]}, 0, "w_0 has input_ids but no reply_spans"),
    ],
)
def test_a_row_that_teaches_nothing_is_refused_by_name(bad, masked, message):
    collator = InputMaskingDataCollator(TOKENIZER, mask_first_n_examples=masked, **FORMAT)
    with pytest.raises(ValueError, match=message):
        collator([row("^I1O2$I3O4$"), bad])


def test_a_cut_row_is_refused_also_without_masking():
    cut = {**row("^I1O2$I3O4$", key="y_0"), "input_ids": row("^I1O2$I3O")["input_ids"]}
    with pytest.raises(ValueError, match="y_0 is cut in the middle"):
        InputMaskingDataCollator(TOKENIZER, mask_inputs=False)([cut])


@pytest.mark.parametrize(
    "options",
    [{"mask_first_n_examples": -1}, {"pad_to_multiple_of": 0}, {"mask_inputs": False, "mask_first_n_examples": 1}],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="mask_first_n_examples"):
        InputMaskingDataCollator(TOKENIZER, **options)


def test_a_tokenizer_without_a_pad_token_is_refused():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        InputMaskingDataCollator(tokenizer)
