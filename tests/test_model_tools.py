"""Cutting the vocabulary, LoRA, saving and merging, on models small enough for any machine."""

import json
import math
import shutil

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import model_tools
import training_tools
from model_tools import EMBEDDING_MODULES, LINEAR_MODULES, Precision

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eom_id|>", "<|eot_id|>"]
TEXT = ["".join(map(str, range(i, i + 40))) + "\nABC xyz+/-= the cat sat on the mat\n" for i in range(300)]
PUZZLE = "ABCxyzI123\n456\n+/-=O12\n3\n<|eot_id|>I1\n+/-=O9\n<|eot_id|>"


def byte_level_tokenizer():
    """Like Llama 3's: byte-level BPE, digits merge in threes, BOS from the post-processor, no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s*[\r\n]+|\s*\p{L}+|[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    bos = tokenizer.token_to_id(SPECIAL[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], bos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token="<|eot_id|>")


def sentencepiece_tokenizer():
    """Like Llama 2's: spaces become "▁", one is put in front, the line break falls back to its byte token."""
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.train_from_iterator(
        [
            t.replace("\n", "").replace(" ", "▁") + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!?.:,;*"
            for t in TEXT
        ],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False),
    )
    tables = json.loads(trained.to_str())["model"]
    model = models.BPE(
        vocab=tables["vocab"], merges=[tuple(m) for m in tables["merges"]], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special[:4]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def save_base(folder, tokenizer, tied=True, dtype=torch.bfloat16, vocabulary=None):
    """A 2-layer Llama with random weights, as a model folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, 1], pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(model, ids):
    model.eval()
    with torch.no_grad():
        return model(ids).logits.float()


def divergence(p, q):
    """KL(p || q) of two logit tensors, mean over positions, in nats."""
    p, q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


@pytest.mark.parametrize(("make", "end"), [(byte_level_tokenizer, "<|eot_id|>"), (sentencepiece_tokenizer, "</s>")])
@pytest.mark.parametrize("tied", [True, False])
def test_prepared_base_has_one_token_per_character_and_the_same_logits(tmp_path, make, end, tied):
    base = save_base(tmp_path / "base", make(), tied)
    (tmp_path / "prepared").mkdir()
    done = model_tools.prepare_base(base, tmp_path / "prepared")
    old, new = model_tools.load_tokenizer(base), model_tools.load_tokenizer(tmp_path / "prepared")
    puzzle = PUZZLE.replace("<|eot_id|>", end)
    ids = new(puzzle)["input_ids"]
    assert len(ids) == 1 + len(puzzle.replace(end, "$"))
    assert new.decode(ids) == new.bos_token + puzzle
    assert len(old(puzzle)["input_ids"]) < len(ids)  # the whole vocabulary does merge
    assert new.pad_token == old.pad_token != new.eos_token == old.eos_token
    assert done["vocabulary"] == len(new) < 90 < done["vocabulary_before"]

    kept = [old.convert_tokens_to_ids(t) for t in new.convert_ids_to_tokens(list(range(len(new))))]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared", dtype=torch.float32)
    new_ids = torch.tensor([ids])
    old_ids = torch.tensor(kept)[new_ids]
    assert torch.equal(logits_of(before, old_ids)[..., kept], logits_of(after, new_ids))
    named = after.config.eos_token_id + [after.config.pad_token_id, after.generation_config.pad_token_id]
    assert [kept[i] for i in named] == [old.eos_token_id, 1, old.pad_token_id, old.pad_token_id]
    shared = after.get_input_embeddings().weight.data_ptr() == after.get_output_embeddings().weight.data_ptr()
    assert shared is tied


def test_full_vocabulary_is_kept_whole(tmp_path):
    base = save_base(tmp_path / "base", byte_level_tokenizer())
    (tmp_path / "prepared").mkdir()
    done = model_tools.prepare_base(base, tmp_path / "prepared", full_vocab=True)
    tokenizer = model_tools.load_tokenizer(tmp_path / "prepared")
    assert done["vocabulary"] == done["vocabulary_before"] == len(tokenizer)
    assert tokenizer(PUZZLE)["input_ids"] == model_tools.load_tokenizer(base)(PUZZLE)["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "prepared").config.pad_token_id == tokenizer.pad_token_id


def test_a_quantised_base_is_refused_with_the_name_of_a_16_bit_one(tmp_path):
    base = save_base(tmp_path / "Llama-3.2-1B-Instruct-bnb-4bit", byte_level_tokenizer())
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised already.*--base_model .*Llama-3.2-1B-Instruct$"):
        model_tools.prepare_base(base, tmp_path)


def test_a_missing_base_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot load the model .*hf auth login.*--base_model FOLDER"):
        model_tools.check_base(tmp_path / "nothing")


def test_a_vocabulary_that_is_not_bpe_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "</s>": 2}, unk_token="a"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    with pytest.raises(ValueError, match="WordLevel.*--full_vocab"):
        model_tools.cut_tokenizer(fast)


def test_a_pad_token_that_is_the_end_token_is_replaced(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert model_tools.load_tokenizer(tmp_path).pad_token == "<|finetune_right_pad_id|>"


# ---------------------------------------------------------------------------------------------------------------------
# LoRA and merging

PRECISIONS = [
    Precision("transformers", dtype, four) for dtype in ("float32", "bfloat16", "float16") for four in (False, True)
]


def train_a_little(model, precision, ids, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        with torch.autocast("cpu", precision.torch_dtype, enabled=precision.dtype != "float32"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tied and untied prepared bases."""
    folders = {}
    for tied in (True, False):
        root = tmp_path_factory.mktemp(f"tied_{tied}")
        (root / "prepared").mkdir()
        model_tools.prepare_base(save_base(root / "base", byte_level_tokenizer(), tied), root / "prepared")
        folders[tied] = root / "prepared"
    return folders


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.dtype}-{'4bit' if p.load_in_4bit else '16bit'}")
@pytest.mark.parametrize("targets", [LINEAR_MODULES + EMBEDDING_MODULES, LINEAR_MODULES], ids=["embeddings", "linear"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merge_is_the_model_that_was_trained(tmp_path, bases, tied, targets, precision):
    torch.manual_seed(0)
    ids = torch.randint(0, 74, (4, 40))
    model, tokenizer = model_tools.load_model(bases[tied], precision)
    start = logits_of(model, ids)
    model = model_tools.add_lora(model, precision, r=16, target_modules=targets)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train_a_little(model, precision, ids)
    trained = logits_of(model, ids)
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    lora.mkdir()
    merged.mkdir()
    model_tools.save_adapter(model, tokenizer, lora, base=bases[tied], precision=precision)
    done = model_tools.merge_adapter(lora, merged)

    # Plain transformers loads the merge; it answers as the trained model does, up to rounding to 16 bits.
    again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert divergence(trained, logits_of(again, ids)) < 1e-5
    assert divergence(trained, start) > 1e-2  # there was something to merge
    saved = AutoModelForCausalLM.from_pretrained(merged)
    assert saved.dtype == (torch.float16 if precision.dtype == "float16" else torch.bfloat16)
    assert done["merged_onto"] == ("quantised" if precision.load_in_4bit else "16-bit")
    shared = again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr()
    assert shared is tied
    # Plain peft loads the adapter onto the folder that it names; loaded as in training, it is the trained model.
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(lora).base_model_name_or_path
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    recorded = Precision(**model_tools.read_manifest(lora)["precision"])
    same, _ = model_tools.load_model(base, recorded)
    assert divergence(trained, logits_of(model_tools.load_adapter(same, lora), ids)) < 1e-5
    assert divergence(trained, logits_of(plain, ids)) < (0.05 if precision.load_in_4bit else 1e-5)


def test_the_original_merge_base_differs_from_the_quantised_one_by_the_quantisation(tmp_path, bases):
    precision = Precision("transformers", "float32", True)
    ids = torch.randint(0, 74, (4, 40), generator=torch.Generator().manual_seed(0))
    model, tokenizer = model_tools.load_model(bases[True], precision)
    model = model_tools.add_lora(model, precision, r=16)
    train_a_little(model, precision, ids)
    trained = logits_of(model, ids)
    model_tools.save_adapter(model, tokenizer, tmp_path, base=bases[True], precision=precision)
    apart = {}
    for merge_base in ("quantised", "original"):
        (tmp_path / merge_base).mkdir()
        model_tools.merge_adapter(tmp_path, tmp_path / merge_base, merge_base=merge_base)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / merge_base, dtype=torch.float32)
        apart[merge_base] = divergence(trained, logits_of(merged, ids))
    assert apart["quantised"] < 1e-5
    assert apart["original"] > 10 * apart["quantised"]


def test_rslora_scales_by_the_root_of_the_rank(bases):
    precision = Precision("transformers", "float32", False)
    for r in (4, 64):
        model = model_tools.add_lora(model_tools.load_model(bases[True], precision)[0], precision, r=r, lora_alpha=24)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(24 / math.sqrt(r))


def test_trained_embeddings_have_a_rate_of_their_own(bases):
    precision = Precision("transformers", "float32", False)
    model = model_tools.add_lora(model_tools.load_model(bases[True], precision)[0], precision, r=4)
    for optim in ("adamw_torch", "adamw_8bit"):
        arguments = TrainingArguments(optim=optim, learning_rate=1e-4, use_cpu=True, report_to=[])
        arguments.embedding_learning_rate = 1e-5
        optimizer = training_tools.optimizer_with_embedding_rate(model, arguments)
        groups = {group["lr"]: group["params"] for group in optimizer.param_groups}
        assert set(groups) == {1e-4, 1e-5}
        assert [p.shape for p in groups[1e-5]] == [model.get_input_embeddings().weight.shape]
        assert len(groups[1e-4]) == 2 * 7 * 2  # A and B of seven layers in two blocks


def test_the_same_random_state_gives_the_same_adapter(bases):
    precision = Precision("transformers", "float32", False)
    states = []
    for seed in (1, 1, 2):
        model = model_tools.add_lora(
            model_tools.load_model(bases[True], precision)[0], precision, r=4, random_state=seed
        )
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


def test_an_adapter_of_another_base_is_refused(tmp_path, bases):
    precision = Precision("transformers", "float32", False)
    model, tokenizer = model_tools.load_model(bases[True], precision)
    model = model_tools.add_lora(model, precision, r=4)
    model_tools.save_adapter(model, tokenizer, tmp_path / "lora", base=bases[True], precision=precision)
    other = save_base(tmp_path / "other", byte_level_tokenizer())
    with pytest.raises(ValueError, match="trained on another base"):
        model_tools.load_adapter(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32), tmp_path / "lora")


def test_merge_base_must_be_known_and_recorded(tmp_path, bases):
    precision = Precision("transformers", "float32", False)
    model, tokenizer = model_tools.load_model(bases[True], precision)
    model_tools.save_adapter(
        model_tools.add_lora(model, precision, r=4), tokenizer, tmp_path / "lora", base=bases[True], precision=precision
    )
    with pytest.raises(ValueError, match="'quantised' or 'original'"):
        model_tools.merge_adapter(tmp_path / "lora", tmp_path, merge_base="other")
    shutil.move(tmp_path / "lora" / model_tools.MANIFEST, tmp_path)
    with pytest.raises(ValueError, match="does not record.*--merge_base original"):
        model_tools.merge_adapter(tmp_path / "lora", tmp_path)


def test_precision_of_a_machine_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_tools.resolve_precision() == Precision("transformers", "float32", False)
    assert model_tools.resolve_precision(load_in_4bit=True).load_in_4bit
    with pytest.raises(ValueError, match="--engine unsloth cannot run here: no CUDA device.*--engine transformers"):
        model_tools.resolve_precision("unsloth")
