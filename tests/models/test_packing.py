"""Documents in one row: each blind to the others, and the same training as with rows of their own."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arc.models.collator import InputMaskingDataCollator
from arc.models.packing import (
    DOCUMENTS,
    attend_documents,
    has_document_kernel,
    pack_rows,
    unsloth_attention,
    use_packed_attention,
)
from arc.models.prompt_sharing import attend_shared, share_prompts
from tests import tiny_models
from tests.helpers import call

LENGTHS = (7, 13, 1, 5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 50, length), np.ones(length, dtype=bool)) for length in LENGTHS]


@pytest.fixture
def packed(model):
    use_packed_attention(model)
    yield model
    model.set_attn_implementation("sdpa")


def test_a_batch_by_hand():
    rows = [
        (np.array([5, 6, 7]), np.array([False, False, True])),
        (np.array([8, 9]), np.array([True, True])),
        (np.array([4]), np.array([True])),
    ]
    batch = pack_rows(rows, "transformers")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 256
    assert batch["use_cache"] is False
    batch = pack_rows(rows, "unsloth")
    assert batch["packed_seq_lengths"].tolist() == [3, 2, 1] and "cu_seq_lens_q" not in batch
    bounds, longest = batch[DOCUMENTS]
    assert bounds.tolist() == [0, 3, 5, 6] and longest == 256
    assert rows[1][1].tolist() == [True, True]  # what was given is left alone
    batch = pack_rows(rows, "transformers", filler=3, multiple_of=8)  # the last document is longer, and learns no more
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]
    assert pack_rows(rows, "unsloth", filler=3, multiple_of=8)["packed_seq_lengths"].tolist() == [3, 2, 3]


def inputs(documents):
    return {name: value for name, value in pack_rows(documents, "transformers").items() if name != "labels"}


def test_packed_rows_give_the_logits_of_separate_ones(packed, documents):
    with torch.no_grad():
        together = packed(**inputs(documents)).logits[0]
        packed.set_attn_implementation("eager")
        alone = torch.cat([packed(torch.from_numpy(ids)[None]).logits[0] for ids, _ in documents])
    assert torch.allclose(together, alone, atol=1e-5)


def test_documents_are_not_searched_for_in_the_positions(packed, documents, monkeypatch):
    import transformers.masking_utils

    def search(position_ids):
        raise AssertionError("the device was asked")

    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", search)
    with torch.no_grad():
        packed(**inputs(documents))
    with pytest.raises(AssertionError, match="was asked"):
        packed(input_ids=torch.zeros((1, 4), dtype=torch.int64), position_ids=torch.arange(4)[None], use_cache=False)


def test_nothing_is_learned_across_a_border(packed, documents):
    """The loss of each document has no gradient at the inputs of another one."""
    batch = inputs(documents)
    embedded = packed.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    log_probs = torch.log_softmax(packed(inputs_embeds=embedded, **batch).logits[0], -1)
    bounds = np.cumsum([0, *LENGTHS])
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        [gradient] = torch.autograd.grad(log_probs[begin:end, 3].sum(), embedded, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached[begin:end].all()
        assert reached.sum() == end - begin


def test_batches_that_are_not_packed_are_as_before(packed, documents):
    ids, mask = np.zeros((len(LENGTHS), 13), dtype=np.int64), np.zeros((len(LENGTHS), 13), dtype=np.int64)
    for row, (tokens, _) in enumerate(documents):
        ids[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, 1  # padded on the left, as for decoding
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    decoded = packed.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    packed.set_attn_implementation("eager")
    assert torch.equal(decoded, packed.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_the_collator_packs_what_it_would_pad():
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    collator = InputMaskingDataCollator(tokenizer, mask_first_n_examples=1)
    rows = [
        {"key": "a", "input_ids": list(range(10, 16)), "reply_spans": [[1, 2], [4, 6]]},
        {"key": "b", "input_ids": list(range(20, 28)), "reply_spans": [[2, 4], [6, 7]]},
    ]
    padded = collator(rows)
    collator.packed_for = "transformers"
    packed = collator(rows)
    kept = padded["attention_mask"].bool()
    count = int(kept.sum())
    assert packed["input_ids"][0, :count].tolist() == padded["input_ids"][kept].tolist()
    assert packed["labels"][0, :count].tolist() == padded["labels"][kept].tolist()
    assert packed["input_ids"].shape == (1, 16) and set(packed["input_ids"][0, count:].tolist()) == {
        tokenizer.pad_token_id
    }
    assert set(packed["labels"][0, count:].tolist()) == {-100}
    with pytest.raises(ValueError, match="row b"):
        collator([rows[0], {**rows[1], "reply_spans": [[2, 4]]}])


@pytest.mark.training
def test_a_stage_trains_the_same_either_way(demo_base, demo_dataset, tmp_path, monkeypatch):
    made, make = set(), torch.utils.data.DataLoader.__init__

    def noting(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.add((self.batch_size, self.num_workers))

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noting)
    flags = [
        "--base_model", demo_base, "--dataset_dir", demo_dataset, "--sizes", 2, "--lora_r", 8, "--max_steps", 4,
        "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--logging_steps", 1, "--eval_steps", 2,
        "--eval_puzzles", 2, "--holdout_examples", 6, "--learning_rate", 1e-3, "--save_steps", 0,
        "--optim", "adamw_torch",
    ]  # fmt: skip
    losses, measured, seen = [], [], []
    for name, which in (("padded", []), ("packed", ["--padding_free", True, "--dataloader_num_workers", 1])):
        made.clear()
        code, printed = call("base_finetune", *flags, *which, "--output_dir", tmp_path / name)
        assert code == 0, printed[-2000:]
        path = tmp_path / name / "Llama-3.2-1B-Base-lora" / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
        measured.append([record["eval_loss"] for record in records if "eval_loss" in record])
        seen.append([record["num_input_tokens_seen"] for record in records if "num_input_tokens_seen" in record])
    # Batches to measure by are always made by the main process.
    assert {(4, 1), (8, 0)} <= made and not {(4, 0), (8, 1)} & made
    assert len(seen[0]) >= 4 and seen[0] == seen[1]  # padding is not counted, nor what fills a row up
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][-1]
    # The trainer divides by the tokens that have labels: 8 first tokens more where rows are padded. To Adam, whose
    # steps do not depend on a factor of the gradient, it is the same.
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert measured[0] == pytest.approx(measured[1], rel=0.01)


def documents_in_one_row(device, dtype, heads=4, shared=2, size=64, lengths=(130, 1, 77, 300)):
    """Queries, keys and values of documents in one row, (1, heads, tokens, size), and where documents begin and end."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    parts = [torch.randn(1, n, tokens, size, generator=generator) for n in (heads, shared, shared)]
    parts = [part.to(device, dtype).requires_grad_() for part in parts]
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
    return parts, bounds, max(lengths)


@pytest.mark.gpu
def test_the_kernel_for_all_documents_is_attention_within_each():
    plain, bounds, longest = documents_in_one_row("cpu", torch.float32)
    expected = attend_documents(*plain, bounds, longest)
    expected.square().sum().backward()
    parts, bounds, longest = documents_in_one_row("cuda", torch.bfloat16)
    found = attend_documents(*parts, bounds, longest)
    found.float().square().sum().backward()
    assert has_document_kernel(parts[0]) and found.shape == expected.shape
    assert torch.allclose(found.float().cpu(), expected, atol=0.03)
    for one, other in zip(parts, plain, strict=True):
        difference = (one.grad.float().cpu() - other.grad).norm() / other.grad.norm()
        assert difference < 0.03


def test_unsloths_attention_is_asked_for_all_but_documents():
    asked = []

    def plain(*, config, context, Q, K, V):  # noqa: N803
        asked.append(context)
        return Q.transpose(1, 2)

    attention = unsloth_attention(plain)
    assert unsloth_attention(attention) is attention  # once is enough
    (query, key, value), bounds, longest = documents_in_one_row("cpu", torch.float32)
    lengths = bounds.diff()
    documents = (lengths, bounds, longest)
    context = {"attention_mask": None, "sliding_window": None, "prefix_seg_info": None, "is_causal": True}
    for info in (None, documents):  # on a CPU there is no kernel: Unsloth's own way
        attention(config=None, context=SimpleNamespace(seq_info=info, **context), Q=query, K=key, V=value)
    assert len(asked) == 2
    # What was said of the batch goes with its lengths, whatever Unsloth has made of them since.
    row, shared, _ = share_prompts([np.arange(2, 302)] * 2, [np.arange(3, 50), np.arange(4, 162)])
    assert row["input_ids"].shape[1] == 299 + 47 + 158
    lengths.documents = (shared, shared.longest[0])
    query, key, value = (part[:, :, :504] for part in (query, key, value))
    context = SimpleNamespace(seq_info=(lengths, None, None), **context)
    found = attention(config=None, context=context, Q=query, K=key, V=value)
    assert torch.equal(found, attend_shared(query, key, value, shared, kernel=False)) and len(asked) == 2


UNSLOTH = """
import os, sys
os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
import unsloth, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from arc.models.loading import Precision, load_model
from arc.models.lora import add_lora
from arc.models.packing import DOCUMENTS, pack_rows, use_packed_attention
precision = Precision("unsloth", "bfloat16", True)
model, tokenizer = load_model(sys.argv[2], precision, 512)
model = add_lora(model, precision, r=8, gradient_checkpointing=False)
rng = np.random.default_rng(0)
rows = [(rng.integers(0, len(tokenizer), n), np.ones(n, dtype=bool)) for n in (130, 40, 77, 300)]
def logits(ids, **more):
    ids = torch.as_tensor(ids)[None].cuda()
    with torch.autocast("cuda", torch.bfloat16):
        return model(input_ids=ids, use_cache=False, **more).logits[0].float()
model.train()
from accelerate.utils import send_to_device
alone = torch.cat([logits(ids) for ids, _ in rows])
batch = {n: v for n, v in send_to_device(pack_rows(rows, "unsloth"), "cuda").items() if n != "labels"}
asked = torch.Tensor.tolist
found = []
for own in (False, True):
    if own:
        use_packed_attention(model, "unsloth")
        torch.Tensor.tolist = None  # nothing asks the device for lengths
    with torch.autocast("cuda", torch.bfloat16):
        found.append(model(**{n: v for n, v in batch.items() if own or n != DOCUMENTS}).logits[0].float())
torch.Tensor.tolist = asked
wrong = torch.cat([alone[:130], torch.roll(alone[130:], 1, 0)])
scale = (alone - wrong).abs().mean()
for together in found:
    print("difference", float((together - alone).abs().mean() / scale), float((together - alone).abs().max()))
    assert (together - alone).abs().mean() < 0.02 * scale
print("the same")
"""


@pytest.mark.gpu
def test_packed_rows_give_the_logits_of_separate_ones_with_unsloth(tmp_path):
    assert "the same\n" in tiny_models.run_with_unsloth(UNSLOTH, tiny_models.prepared_base(tmp_path))
