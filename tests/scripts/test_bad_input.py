"""Bad input through the stages as a user runs them: one clear error, exit code 2, and nothing written.

CASES is the table: a name, what makes the input and gives the flags that point to it, and words that the message has to
say. The scripts' own flags follow, so that a case is one line where it can be one.
"""

import importlib
import json
import os
import re
import shutil
import signal
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file

PREFIX = "Llama-3.2-1B"
FLAGS = (
    "--engine", "transformers", "--sizes", 3, "--max_seq_length", 320, "--holdout_examples", 4, "--lora_r", 4,
    "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--eval_steps", 0, "--max_steps", 2,
    "--gradient_checkpointing", False, "--logging_steps", 1, "--save_steps", 0,
)  # fmt: skip
LONGEST_LINE, MOST_LINES = 1000, 6
SECONDS = 20  # a case takes well under one; a pipe that is read would take for ever


class Place:
    """What a case can start from: an empty folder, the demo's base and dataset, and a finished stage 1."""

    def __init__(self, folder, base, dataset, finished):
        self.folder, self.demo_base, self.demo_dataset, self.finished = folder, base, dataset, finished
        self.output = folder / "output"

    def file(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def dataset(self, content=None, name="odd.json"):
        """A dataset of one good file and, if `content` is given, another one beside it."""
        self.file("dataset/good.json", json.dumps([PAIR] * 40))
        if content is not None:
            self.file(f"dataset/{name}", content)
        return self.folder / "dataset"

    def base(self):
        """A copy of the base, to be harmed."""
        return shutil.copytree(self.demo_base, self.folder / "base")

    def done(self, *without):
        """A copy of the finished stage 1, in the output folder; without some artifacts' folders and the checkpoints."""
        gone = shutil.ignore_patterns(*(f"{PREFIX}-{name}" for name in (*without, "Base-checkpoints")), ".lock")
        shutil.copytree(self.finished, self.output, ignore=gone)
        return self.output


class Case(NamedTuple):
    name: str
    make: object  # called with a Place; returns flags
    words: tuple
    script: str = "base_finetune"


PAIR = {"input": [[1, 2], [3, 4]], "output": [[5]]}
GOOD = json.dumps(PAIR)


def in_output(grid):
    """JSON of a file whose second pair has this text in the place of its output."""
    return f'[{GOOD}, {{"input": [[1]], "output": {grid}}}]'


# -- data: what stands in one file of the dataset

FILES = [
    # name, content of odd.json, words
    ("empty file", b"", ("not JSON", "line 1, column 1")),
    ("not JSON", b"puzzles, as I said\n", ("not JSON", "line 1, column 1")),
    ("truncated JSON", f"[{GOOD}, {GOOD[:30]}", ("not JSON", "line 1, column", "complete")),
    ("a comma too many", f"[{GOOD},]", ("not JSON", "line 1")),
    ("two values", f"[{GOOD}]\n[{GOOD}]", ("not JSON at line 2, column 1",)),
    ("NaN", in_output("[[NaN]]"), ("pair 2, output, row 1", "nan", "integers 0 to 9")),
    ("Infinity", in_output("[[1], [Infinity]]"), ("pair 2, output, row 2", "inf")),
    ("1e400", in_output("[[1e400]]"), ("pair 2, output, row 1", "inf", "integers 0 to 9")),
    ("integer of 30 digits", in_output(f"[[{10**30}]]"), ("pair 2, output, row 1", "more than 64 bits")),
    ("integer of 5,000 digits", in_output(f"[[{'9' * 5000}]]"), ("digits", "cells 0 to 9")),
    ("boolean", in_output("[[true]]"), ("pair 2, output, row 1", "True")),
    ("float", in_output("[[1.0]]"), ("pair 2, output, row 1", "1.0")),
    ("string cell", in_output('[["1"]]'), ("pair 2, output, row 1", "'1'")),
    ("string row", in_output('["123"]'), ("pair 2, output, row 1", "'123'", "a list of cells")),
    ("null", in_output("[[null]]"), ("pair 2, output, row 1", "None")),
    ("negative", in_output("[[1, -1]]"), ("pair 2, output, row 1", "-1")),
    ("colour 10", in_output("[[0, 10]]"), ("pair 2, output, row 1", "10", "0 to 9")),
    ("31 rows", in_output(json.dumps([[1]] * 31)), ("pair 2, output", "31 rows", "1 to 30")),
    ("31 columns", in_output(json.dumps([[1] * 31])), ("pair 2, output, row 1", "31 cells", "1 to 30")),
    ("no rows", in_output("[]"), ("pair 2, output", "0 rows", "1 to 30")),
    ("empty rows", in_output("[[], []]"), ("pair 2, output, row 1", "0 cells")),
    ("ragged rows", in_output("[[1, 2], [3]]"), ("pair 2, output, row 2", "1 cells", "2 as in row 1")),
    ("a level too deep", in_output("[[[1]]]"), ("pair 2, output, row 1", "[1]", "integers")),
    ("a level too shallow", in_output("[1, 2]"), ("pair 2, output, row 1", "1", "a list of cells")),
    ("100,000 levels", "[" * 100_000 + "]" * 100_000, ("nested too deeply",)),
    ("900 levels", in_output("[" * 900 + "]" * 900), ("pair 2, output, row 1", "[[")),
    ("a dict for a grid", in_output('{"0": [1]}'), ("pair 2, output", "{'0': [1]}", "a list of rows")),
    ("a dict for a list of pairs", GOOD, ("{'input':", "a list of pairs")),
    ("null for a pair", f"[{GOOD}, null]", ("pair 2", "None", '"input"')),
    ("no output", f'[{GOOD}, {{"input": [[1]]}}]', ("pair 2", '"output"')),
    ("no input", f'[{GOOD}, {{"output": [[1]]}}]', ("pair 2", '"input"')),
    ("a name twice", f'[{GOOD}, {{"input": [[1]], "input": [[2]], "output": [[3]]}}]', ("duplicate", "'input'")),
    ("no pairs", "[]", ("no pairs",)),
    ("official without demonstrations", f'{{"train": [], "test": [{GOOD}]}}', ("train", "no pairs")),
    ("official without tests", f'{{"train": [{GOOD}], "test": []}}', ("test", "no pairs")),
    ("Kaggle's format", f'{{"abc": {{"train": [{GOOD}], "test": [{GOOD}]}}}}', ("Kaggle", "load_from_json")),
    ("UTF-16", f"[{GOOD}]".encode("utf-16"), ("0xff at 0", "UTF-8")),
    ("bytes that are not UTF-8", f"[{GOOD}, ".encode() + b'"\xc3("]', ("0xc3", "UTF-8")),
    ("Latin-1", f'[{GOOD}, {{"café": 1}}]'.encode("latin-1"), ("0xe9", "UTF-8")),
    ("a NUL byte", f"[{GOOD}]\0", ("not JSON at line 1",)),
    ("a web page", "<!DOCTYPE html><html>404</html>", ("not JSON at line 1, column 1",)),
    ("a pointer of Git LFS", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("not JSON",)),
]  # fmt: skip


def data(make):
    """Flags that name the dataset folder that `make` gives."""
    return lambda place: ("--dataset_dir", make(place))


def with_file(content):
    return data(lambda place: place.dataset(content))


def link(name, target):
    def make(place):
        (place.dataset() / name).symlink_to(place.folder / "dataset" / target if target[0] != "/" else target)
        return place.folder / "dataset"

    return data(make)


def fifo(place):
    os.mkfifo(place.dataset() / "odd.json")
    return place.folder / "dataset"


def sparse(place):
    # All zero bytes, of which the disk holds none.
    path = place.dataset(b"") / "odd.json"
    os.truncate(path, 200_000_000)
    return path.parent


def folder_as_file(place):
    (place.dataset() / "odd.json").mkdir()
    return place.folder / "dataset"


def unreadable(place):
    (place.dataset("[]") / "odd.json").chmod(0)
    return place.folder / "dataset"


def same_names(place):
    place.file("dataset/a_b.json", json.dumps([PAIR] * 9))
    place.file("dataset/a.b.json", json.dumps([PAIR] * 9))
    return place.folder / "dataset"


def only(content, name="only.json"):
    """A dataset of this one file."""
    return data(lambda place: place.file(f"dataset/{name}", content).parent)


FOLDERS = [
    ("no such folder", data(lambda p: p.folder / "nowhere"), ("nowhere: no such folder", "make_dataset.py --out")),
    ("a file for a folder", data(lambda p: p.file("puzzles.json", "[]")), ("puzzles.json is a file", "a folder")),
    ("an empty folder", data(lambda p: Path(shutil.copytree(p.demo_dataset, p.folder / "d", ignore=lambda *n: n[1]))),
     ("found no *.json", "make_dataset.py")),
    ("no JSON files", only("1,2,3", "puzzles.csv"), ("found no *.json",)),
    ("hidden files alone", only(f"[{GOOD}]", ".hidden.json"), ("found no *.json",)),
    ("one pair", only(f"[{GOOD}]"), ("no task has the pairs of one puzzle", "3 and a test")),
    ("too few pairs", only(json.dumps([PAIR] * 3)), ("no task has the pairs of one puzzle", "3 and a test")),
    ("one puzzle, and more held out", only(json.dumps([PAIR] * 4)), ("--holdout_examples", "maximum of 0")),
    ("two files of one name", data(same_names), ("a_b.json", "a.b.json", "duplicate id 'a-b'", "rename")),
    ("a name that is not UTF-8", data(lambda p: p.dataset("[]", os.fsdecode(b"\xff.json"))), ("UTF-8", "rename")),
    ("a loop of links", link("odd.json", "odd.json"), ("odd.json", "cannot be read", "links")),
    ("a link to nothing", link("odd.json", "gone"), ("odd.json", "no such file")),
    ("a device", link("odd.json", "/dev/zero"), ("odd.json", "device")),
    ("a pipe", data(fifo), ("odd.json", "pipe")),
    ("a pipe for a folder", data(lambda p: (os.mkfifo(p.folder / "pipe"), p.folder / "pipe")[1]), ("not a folder",)),
    ("a folder for a file", data(folder_as_file), ("odd.json", "folder")),
    ("200 MB of zeros", data(sparse), ("odd.json", "200,000,000 bytes", "at most")),
    ("a file that may not be read", data(unreadable), ("odd.json", "cannot be read")),
]  # fmt: skip

# -- settings

SETTINGS = [
    # flags, words
    ("--learning_rate nan", ("learning_rate is nan", "above 0")),
    ("--learning_rate inf", ("learning_rate is inf", "above 0")),
    ("--learning_rate=-1e-4", ("learning_rate is -0.0001", "above 0")),
    ("--learning_rate fast", ("--learning_rate", "invalid float value: 'fast'")),
    ("--embedding_learning_rate 0", ("embedding_learning_rate is 0.0", "above 0")),
    ("--lora_alpha nan", ("lora_alpha is nan",)),
    ("--max_grad_norm -1", ("max_grad_norm is -1.0",)),
    ("--weight_decay -1", ("weight_decay is -1.0", "from 0")),
    ("--adam_beta2 1", ("adam_beta2 is 1.0", "below 1")),
    ("--warmup_ratio 1.5", ("warmup_ratio is 1.5", "below 1")),
    ("--warmup_ratio nan", ("warmup_ratio is nan",)),
    ("--lora_dropout 1", ("lora_dropout is 1.0", "below 1")),
    ("--num_train_epochs inf", ("num_train_epochs is inf",)),
    ("--lora_r 0", ("lora_r is 0", "from 1")),
    ("--lora_r 1.5", ("--lora_r", "invalid int value: '1.5'")),
    ("--n 0", ("n is 0", "from 1")),
    ("--n 99999", ("99,999", "the maximum of")),
    ("--sizes 0", ("sizes is [0]", "from 1")),
    ("--sizes six", ("--sizes", "invalid int value: 'six'")),
    ("--sizes 500", ("no task has the pairs of one puzzle", "500 and a test")),
    ("--grid_sizes 5 3", ("grid_sizes is [5, 3]", "two bounds")),
    ("--grid_sizes 5", ("grid_sizes is [5]", "two bounds")),
    ("--grid_sizes 29 30", ("no task has the pairs of one puzzle within grid_sizes (29, 30)",)),
    ("--holdout_examples 99999", ("99,999 examples to hold out", "maximum of")),
    ("--holdout_tasks 99999", ("99,999 tasks to hold out", "maximum of")),
    ("--holdout_tasks -1", ("holdout_tasks is -1", "from 0")),
    ("--max_seq_length 8", ("max_seq_length is 8", "from 16")),
    ("--max_seq_length 60", ("no puzzle fits --max_seq_length 60", "raise it")),
    ("--seed -1", ("seed is -1", "from 0")),
    ("--seed 4294967296", ("seed is 4294967296", "below 2**32")),
    ("--random_state 18446744073709551616", ("random_state is 18446744073709551616",)),
    ("--max_steps 0", ("max_steps is 0", "-1 for no limit")),
    ("--save_steps -1", ("save_steps is -1", "from 0")),
    ("--per_device_train_batch_size 0", ("per_device_train_batch_size is 0", "from 1")),
    ("--target_modules q_proj foo_proj", ("target_modules is ['q_proj', 'foo_proj']", "names among q_proj")),
    ("--target_modules lm_head", ("target_modules is ['lm_head']", "not only embeddings")),
    ("--engine magic", ("engine is 'magic'", "auto or unsloth or transformers")),
    ("--engine unsloth", ("--engine unsloth cannot run here", "use --engine transformers")),
    ("--dtype int8", ("dtype is 'int8'", "bfloat16")),
    ("--merge_base best", ("merge_base is 'best'", "quantised or original")),
    ("--tp maybe", ("tp is 'maybe'", "all or true or false")),
    ("--perm maybe", ("--perm", "maybe")),
    ("--optim magic", ("--optim magic", "adamw_8bit")),
    ("--lr_scheduler_type magic", ("--lr_scheduler_type magic", "cosine")),
    ("--report_to nobody", ("--report_to nobody", "not supported")),
    ("--report_to wandb", ("--report_to wandb", "installed")),
    ("--learing_rate 1e-4", ("unknown flags: --learing_rate", "--help")),
    ("stray words", ("unknown flags: stray words", "--help")),
    ("--lora_r", ("--lora_r", "expected one argument")),
    ("--artifact_prefix a/b", ("artifact_prefix is 'a/b'",)),
    ("--artifact_prefix=", ("artifact_prefix is ''",)),
    ("--output_dir=", ("output_dir is ''",)),
    ("--lora_r 0 --seed -1 --tp maybe", ("lora_r is 0", "seed is -1", "tp is 'maybe'")),
    ("train_grpo --num_generations 3", ("num_generations is 3", "divide the 4 of a step")),
    ("train_grpo --num_generations 1", ("num_generations is 1", "2 or more")),
    ("train_grpo --temperature nan", ("temperature is nan", "above 0")),
    ("train_grpo --reward_cells 2", ("reward_cells is 2.0", "below reward_exact")),
    ("train_grpo --loss_type magic", ("loss_type is 'magic'", "dapo")),
    ("base_finetune_final --mask_first_n_examples -1", ("mask_first_n_examples is -1", "from 0")),
]  # fmt: skip


def setting_case(text, words):
    first, *rest = text.split()
    script = first if first in ("train_grpo", "base_finetune_final") else "base_finetune"
    flags = ("--base_model", "nowhere", *rest) if script != "base_finetune" else (first, *rest)
    return Case(f"settings: {text}", lambda place: flags, words, script)


def config(content, name="settings.yaml"):
    return lambda place: ("--config", place.file(name, content))


def output(make):
    return lambda place: ("--output_dir", make(place))


FILES_OF_SETTINGS = [
    ("no such file", lambda p: ("--config", p.folder / "gone.yaml"), ("gone.yaml: no such file",)),
    ("a folder", lambda p: ("--config", p.folder), ("--config",)),
    ("not YAML", config("lora_r: [1, 2\n"), ("settings.yaml is not YAML",)),
    ("not UTF-8", config(b"lora_r: \xff\n"), ("settings.yaml is not YAML",)),
    ("control characters", config(b"lora_r: \x00\n"), ("settings.yaml is not YAML",)),
    ("a Python object", config("lora_r: !!python/object/apply:os.getcwd []\n"), ("settings.yaml is not YAML",)),
    ("a list", config("- lora_r\n"), ("settings.yaml: found a list", "name: value")),
    ("an unknown name", config("lora_rr: 4\n"), ("settings.yaml: unknown settings lora_rr",)),
    ("a wrong type", config("lora_r: many\n"), ("--lora_r", "invalid int value: 'many'")),
    ("a bad number", config("learning_rate: .nan\n"), ("learning_rate is nan",)),
    ("a dict for a value", config("sizes: {a: 1}\n"), ("sizes",)),
    ("a list for a value", config("lora_r: [4, 5]\n"), ("lora_r",)),
    ("a name twice", config("lora_alpha: 4\nlora_alpha: 8\n"), ("settings.yaml", "lora_alpha", "twice")),
]  # fmt: skip

OUTPUTS = [
    ("a file", output(lambda p: p.file("taken", "mine")), ("taken",)),
    ("under a file", output(lambda p: p.file("taken", "mine") / "output"), ("taken",)),
    ("where nothing can be made", output(lambda p: Path("/proc/nowhere/output")), ("/proc",)),
    ("a link to nothing", output(lambda p: ((p.folder / "l").symlink_to(p.folder / "x"), p.folder / "l")[1]), ("l",)),
]  # fmt: skip


# -- model folders


def model(harm):
    """Flags that name a copy of the base that `harm` was called with."""

    def make(place):
        base = place.base()
        return ("--base_model", harm(base) or base)

    return make


def edit_json(name, **values):
    """Change entries of a JSON file; None removes one."""

    def harm(folder):
        path = folder / name
        now = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in now.items() if value is not None}))

    return harm


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(*names):
    def harm(folder):
        for name in names:
            (folder / name).unlink()

    return harm


def cut(name, to):
    return lambda folder: os.truncate(folder / name, to)


def as_pickle(folder):
    import torch

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder):
    """Two shards and their index, without the second shard."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    half = {name: state[name] for name in names[:5]}
    save_file(half, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    places = {name: f"model-0000{1 + (name not in half)}-of-00002.safetensors" for name in names}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def without_a_tensor(name):
    def harm(folder):
        file = next(folder.glob("*model.safetensors"))
        state = load_file(file)
        found = [tensor for tensor in state if name in tensor]
        save_file({n: t for n, t in state.items() if n != found[0]}, file, metadata={"format": "pt"})

    return harm


def with_huge_header(folder):
    # A header that says it is larger than the file.
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + content[8:])


def another_tokenizer(folder):
    """A tokenizer with more tokens than the embedding has rows."""
    path = folder / "tokenizer.json"
    tables = json.loads(path.read_text())
    tables["added_tokens"].append({**tables["added_tokens"][0], "id": 512, "content": "<|more|>"})
    path.write_text(json.dumps(tables))


def word_tokenizer(folder):
    """A vocabulary of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "[UNK]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *"0123456789"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(specials)
    words.save(str(folder / "tokenizer.json"))


def without_pad_token(folder):
    path = folder / "tokenizer.json"
    path.write_text(re.sub(r"finetune_right_pad_id|reserved_special_token_\d", "other", path.read_text(), count=0))


MODELS = [
    ("no such folder", lambda p: ("--base_model", p.folder / "nowhere"), ("nowhere", "--base_model FOLDER")),
    ("no such hub model", lambda p: ("--base_model", "nobody/nothing"), ("nobody/nothing", "hf auth login")),
    ("no name at all", lambda p: ("--base_model", ""), ("base_model",)),
    ("an empty folder", lambda p: ("--base_model", (p.folder / "m", (p.folder / "m").mkdir())[0]), ("config.json",)),
    ("a file", lambda p: ("--base_model", p.file("model.gguf", "GGUF")), ("model.gguf",)),
    ("no config.json", model(remove("config.json")), ("config.json",)),
    ("config.json is not JSON", model(write("config.json", b"{")), ("config.json", "JSON")),
    ("config.json is a list", model(write("config.json", b"[]")), ("config.json",)),
    ("config.json of nothing", model(write("config.json", b"{}")), ("config.json", "model_type")),
    ("an unknown architecture", model(edit_json("config.json", model_type="nonesuch")), ("base", "nonesuch")),
    ("an encoder", model(edit_json("config.json", model_type="bert", architectures=["BertModel"])), ("base",)),
    ("a model of another layout", model(edit_json("config.json", model_type="gpt2")), ("base", "weights lack")),
    ("a wrong width", model(edit_json("config.json", hidden_size=128)), ("base", "is of shape", "config.json")),
    ("a width of text", model(edit_json("config.json", hidden_size="64")), ("base", "config.json")),
    ("no heads", model(edit_json("config.json", num_attention_heads=0)), ("base", "config.json")),
    ("a layer too many", model(edit_json("config.json", num_hidden_layers=3)), ("base", "weights lack")),
    ("code of its own", model(edit_json("config.json", model_type="mine", auto_map={"AutoConfig": "c.C",
     "AutoModelForCausalLM": "c.M"})), ("base", "code")),
    ("quantised already", model(edit_json("config.json", quantization_config={"quant_method": "bitsandbytes",
     "load_in_4bit": True})), ("base is quantised already", "16-bit")),
    ("a pickle", model(as_pickle), ("model.safetensors", "pytorch_model.bin is a pickle")),
    ("no weights", model(remove("model.safetensors")), ("holds no model.safetensors",)),
    ("truncated weights", model(cut("model.safetensors", 1000)), ("model.safetensors cannot be read",)),
    ("weights cut at their end", model(cut("model.safetensors", 300_000)), ("model.safetensors cannot be read",)),
    ("empty weights", model(cut("model.safetensors", 0)), ("model.safetensors cannot be read",)),
    ("a header that lies", model(with_huge_header), ("model.safetensors cannot be read",)),
    ("a web page for weights", model(write("model.safetensors", b"<html>404</html>" * 9)), ("cannot be read",)),
    ("a missing shard", model(sharded), ("holds no model-00002-of-00002.safetensors",)),
    ("an index of nothing", model(write("model.safetensors.index.json", b"{}")), ("is no index of weights",)),
    ("an index that leads elsewhere", model(write("model.safetensors.index.json",
     b'{"weight_map": {"x": "../../x.safetensors"}}')), ("x.safetensors",)),
    ("a missing tensor", model(without_a_tensor("mlp.up_proj")), ("weights lack", "up_proj")),
    ("no tokenizer.json", model(remove("tokenizer.json")), ("holds no tokenizer.json",)),
    ("tokenizer.json is not JSON", model(write("tokenizer.json", b"{")), ("tokenizer.json is not JSON",)),
    ("tokenizer_config.json is not JSON", model(write("tokenizer_config.json", b"{")), ("tokenizer",)),
    ("generation_config.json is not JSON", model(write("generation_config.json", b"{")), ("generation_config.json",)),
    ("another model's tokenizer", model(another_tokenizer), ("ids up to 512", "512 rows")),
    ("a vocabulary of words", model(word_tokenizer), ("WordLevel", "BPE", "--full_vocab true")),
    ("no token to pad with", model(without_pad_token), ("no token to pad with", "<|finetune_right_pad_id|>")),
]  # fmt: skip


# -- folders of the pipeline


def artifact(place, name):
    return place.output / f"{PREFIX}-{name}"


def after(*without, harm=None, of="Base-lora"):
    """Flags for a finished stage 1 without some artifacts, one of them harmed."""

    def make(place):
        place.done(*without)
        if harm:
            harm(artifact(place, of))
        return ()

    return make


def forget_manifest(*harms):
    """As a folder that was made elsewhere: without the table that tells of every change."""

    def harm(folder):
        (folder / "manifest.json").unlink()
        for each in harms:
            each(folder)

    return harm


def adapter_as_base(place):
    place.done()
    return ("--base_model", artifact(place, "Base-lora"), "--output_dir", place.folder / "other")


def merged_as_lora(*without):
    def make(place):
        place.done("Base-lora", "Base-merged")
        source = place.finished / f"{PREFIX}-Base-merged"
        shutil.copytree(source, artifact(place, "Base-lora"), ignore=shutil.ignore_patterns(*without))
        return ()

    return make


def other_adapter(folder):
    """Matrices of another width."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    save_file({n: t[..., : t.shape[-1] // 2].contiguous() for n, t in state.items()}, file, metadata={"format": "pt"})


def original(make):
    """For an adapter that was made elsewhere: the way of merging that needs no record of how it was trained."""
    return lambda place: (*make(place), "--merge_base", "original")


def stage_2(*without, harm, of="Base-merged"):
    return after(*without, harm=harm, of=of)


ARTIFACTS = [
    ("an adapter as --base_model", adapter_as_base, ("Base-lora", "adapter"), "base_finetune"),
    ("a merged model as -lora", merged_as_lora(), ("Base-lora",), "base_finetune"),
    ("another model as -lora", merged_as_lora("manifest.json"), ("Base-lora", "no adapter"), "base_finetune"),
    ("an adapter of another base", original(after("Base-merged", harm=forget_manifest(other_adapter))),
     ("Base-lora", "another base"), "base_finetune"),
    ("an adapter that does not say how its base was loaded", after("Base-merged", harm=forget_manifest()),
     ("Base-lora does not record how its base was loaded", "--merge_base original"), "base_finetune"),
    ("an adapter without tensors", after("Base-merged", harm=remove("adapter_model.safetensors")),
     ("Base-lora is damaged: adapter_model.safetensors is missing", "--overwrite"), "base_finetune"),
    ("an adapter that was made elsewhere, without tensors",
     after("Base-merged", harm=forget_manifest(remove("adapter_model.safetensors"))),
     ("Base-lora is damaged", "holds no adapter_model.safetensors"), "base_finetune"),
    ("an adapter that was made elsewhere, without one tensor",
     original(after("Base-merged", harm=forget_manifest(without_a_tensor("up_proj.lora_B")))),
     ("Base-lora", "up_proj"), "base_finetune"),
    ("an adapter's configuration is not JSON",
     after("Base-merged", harm=forget_manifest(write("adapter_config.json", b"{"))),
     ("adapter_config.json is not JSON",), "base_finetune"),
    ("an adapter's configuration of another method",
     after("Base-merged", harm=forget_manifest(write("adapter_config.json", b'{"peft_type": "NONESUCH"}'))),
     ("Base-lora", "adapter_config.json"), "base_finetune"),
    ("a manifest that is not JSON", after(harm=write("manifest.json", b"{")), ("manifest.json",), "base_finetune"),
    ("a manifest of odd values", after(harm=write("manifest.json", b'{"files": 5, "made_from": 7}')),
     ("manifest.json",), "base_finetune"),
    ("a manifest of odd names", after(harm=write("manifest.json", b'{"files": {"x": {}}}')),
     ("Base-lora",), "base_finetune"),
    ("a file for an artifact", after("Base-lora", "Base-merged",
     harm=lambda folder: folder.write_text("mine") and None), ("Base-lora", "no folder"), "base_finetune"),
    ("a merged model cut short", after(harm=cut("model.safetensors", 1000), of="Base-merged"),
     ("Base-merged is damaged: model.safetensors has 1,000 bytes", "--overwrite"), "base_finetune"),
    ("a parent cut short", stage_2(harm=cut("model.safetensors", 1000)),
     ("Base-merged is damaged: model.safetensors has 1,000 bytes", "base_finetune.py"), "base_finetune_final"),
    ("a parent with a missing shard", stage_2(harm=forget_manifest(sharded)),
     ("Base-merged", "model-00002-of-00002.safetensors"), "base_finetune_final"),
    ("no parent", lambda place: (), ("Base-merged is not there", "base_finetune.py", "--base_model"),
     "base_finetune_final"),
    ("no parent of stage 3", lambda place: (*after()(place), "--num_generations", 2),
     ("Final-merged is not there", "base_finetune_final.py"), "train_grpo"),
    ("checkpoints of something else", lambda p: (p.file(f"output/{PREFIX}-Base-checkpoints", "mine"), ())[1],
     ("Base-checkpoints",), "base_finetune"),
]  # fmt: skip

CASES = [
    *(Case(f"file: {name}", with_file(content), ("odd.json", *words)) for name, content, words in FILES),
    *(Case(f"dataset: {name}", make, words) for name, make, words in FOLDERS),
    *(setting_case(text, words) for text, words in SETTINGS),
    *(Case(f"config: {name}", make, words) for name, make, words in FILES_OF_SETTINGS),
    *(Case(f"output: {name}", make, words) for name, make, words in OUTPUTS),
    *(Case(f"model: {name}", make, words) for name, make, words in MODELS),
    *(Case(f"artifact: {name}", make, words, script) for name, make, words, script in ARTIFACTS),
]


def snapshot(folder):
    """Everything below a folder, without following links or opening anything: equal if nothing was touched.

    But for .lock, which a run takes in an output folder that is there before it looks at what it merges.
    """
    found = {}
    for path in [folder, *(path for path in folder.rglob("*") if path.name != ".lock")]:
        state = path.lstat()
        found[str(path)] = (state.st_mode, state.st_size, state.st_mtime_ns if not path.is_dir() else 0)
    return found


def stage(script, flags):
    """Call a stage's main as its command line would; returns the exit code."""
    module = importlib.import_module(script)
    arguments, sys.argv = sys.argv, [f"{script}.py", *map(str, flags)]
    try:
        module.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = arguments
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_base, demo_dataset):
    """The output folder of a finished stage 1."""
    output = tmp_path_factory.mktemp("finished") / "output"
    given = ("--base_model", demo_base, "--dataset_dir", demo_dataset, "--output_dir", output)
    assert stage("base_finetune", (*FLAGS, *given)) == 0
    return output


@pytest.fixture
def place(tmp_path, demo_base, demo_dataset, finished, monkeypatch):
    monkeypatch.setenv("ARC_LOADER_CACHE", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ARC_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)  # what is written under a relative name is seen too
    return Place(tmp_path, demo_base, demo_dataset, finished)


def timed_out(*_):
    pytest.fail(f"took more than {SECONDS} s", pytrace=True)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_gets_one_error_that_names_it_and_writes_nothing(case, place, capfd):
    if case.name == "dataset: a file that may not be read" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    given = case.make(place)
    flags = ["--dataset_dir", place.demo_dataset, "--output_dir", place.output]
    if case.script == "base_finetune":
        flags += ["--base_model", place.demo_base]
    before = snapshot(place.folder), snapshot(place.demo_base), snapshot(place.demo_dataset)
    capfd.readouterr()
    usual = signal.signal(signal.SIGALRM, timed_out)
    signal.alarm(SECONDS)
    try:
        code = stage(case.script, (*FLAGS, *flags, *given))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
    printed, errors = capfd.readouterr()
    assert code == 2, f"exit code {code}:\n{printed}\n{errors}"
    assert "Traceback" not in printed + errors, errors
    # Nothing follows the error, and nothing but the progress bars of reading weights comes before it.
    earlier, start, message = f"\n{errors}".rpartition("\nerror: ")
    assert start and not re.sub(r"Loading weights:[^\r\n]*", "", earlier).strip(), errors
    lines = message.splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= LONGEST_LINE, errors
    missing = [word for word in case.words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert (snapshot(place.folder), snapshot(place.demo_base), snapshot(place.demo_dataset)) == before


def test_the_table_has_no_name_twice():
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_flags_of_the_table_are_good_ones(place, capfd):
    # Else a case could pass for another reason than its own; a byte order mark is allowed.
    place.dataset(b"\xef\xbb\xbf" + json.dumps([PAIR] * 8).encode())
    given = ("--dataset_dir", place.folder / "dataset", "--output_dir", place.output, "--base_model", place.demo_base)
    before = snapshot(place.folder)
    assert stage("base_finetune", (*FLAGS, *given, "--dry_run")) == 0, capfd.readouterr()
    assert snapshot(place.folder) == before
