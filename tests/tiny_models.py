"""Models and tokenizers small enough for any machine, for the tests of what is done with them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from arc.models.prepared_base import prepare_base
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.text import format_options

ROOT = Path(__file__).resolve().parents[1]
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


def save_base(folder, tokenizer, tied=True, dtype=torch.bfloat16, vocabulary=None, **more):
    """A 2-layer Llama with random weights, as a model folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, 1], pad_token_id=tokenizer.pad_token_id, **more,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared_base(folder, tied=True, full_vocab=False, **more):
    """Such a base as stages start from: its vocabulary cut, unless it is to be kept whole."""
    prepared = folder / "prepared"
    prepared.mkdir()
    base = save_base(folder / "base", byte_level_tokenizer(), tied, **more)
    prepare_base(base, prepared, full_vocab)
    return prepared


def logits_of(model, ids):
    model.eval()
    with torch.no_grad():
        return model(ids).logits.float()


def divergence(p, q):
    """KL(p || q) of two logit tensors, mean over positions, in nats."""
    p, q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def train_a_little(model, precision, ids, steps=12, rate=1e-2):
    """Train on one batch, as the precision says, without oneDNN's kernels; returns the last loss.

    Which these are is the CPU's choice. With those for AMX one model in bfloat16 came out so that nearly all that
    rounding its weights changes lay at one of 128 positions.
    """
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    with torch.backends.mkldnn.flags(enabled=False):
        for _ in range(steps):
            with torch.autocast("cpu", precision.torch_dtype, enabled=precision.dtype != "float32"):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return float(loss.detach())


def teach_format(folder, dataset, steps=60, rate=5e-3):
    """Train a model folder, in float32 and on one batch after the other, until most of its replies are grids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        rows = encoder.encode(dataset, [dataset.keys[i] for i in rng.integers(0, len(dataset.keys), 8)])
        ids = np.zeros((8, max(len(row["input_ids"]) for row in rows)), dtype=np.int64)
        labels = np.full_like(ids, -100)
        for at, row in enumerate(rows):
            ids[at, : len(row["input_ids"])] = labels[at, : len(row["input_ids"])] = row["input_ids"]
        model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def taught_policy(folder):
    """A policy for reinforcement learning, taught in seconds, and its dataset of grids of one cell.

    Inputs of 3 and 4 have the answer 1, which it always gives ("sure"); those of 5 have 1 or 2 at random, of which it
    gives either half of the time ("coin"); those of 7 have the answer 8, for which it was taught 9 ("never").

    Returns:
        The dataset's folder and the model's, to be used with --perm false and --sizes 2.
    """
    rng = np.random.default_rng(0)

    def tasks(never):
        return {
            "sure": [{"input": [[3 + i % 2]], "output": [[1]]} for i in range(90)],
            "coin": [{"input": [[5]], "output": [[int(rng.integers(1, 3))]]} for _ in range(90)],
            "never": [{"input": [[7]], "output": [[never]]} for _ in range(45)],
        }

    folders = {}
    for name, never in (("dataset", 8), ("lessons", 9)):
        folders[name] = Path(folder) / name
        folders[name].mkdir()
        for task, pairs in tasks(never).items():
            (folders[name] / f"{task}.json").write_text(json.dumps(pairs))
    lessons = ArcDataset.load_from_local_json(folders["lessons"], sizes=(2,), seed=1)
    policy = prepared_base(Path(folder))
    for steps, rate in ((150, 5e-3), (200, 1e-3), (50, 2e-4)):
        teach_format(policy, lessons, steps, rate)
    return folders["dataset"], policy


def run_with_unsloth(code, base, *more):
    """Run code in a process of its own, as Unsloth changes transformers for all that comes after; what it prints.

    Args:
        code: Python; its arguments are the project's folder, `base` and `more`.
        base: a prepared base.
        more: anything that can be written.
    """
    pytest.importorskip("bitsandbytes")
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    command = [sys.executable, "-c", code, *map(str, (ROOT, base, *more))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
