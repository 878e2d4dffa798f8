"""The pretraining of the demo's base: what its batches hold, what comes out, and that it does so again."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from arc.generation import pretraining
from arc.generation.families import FAMILIES
from arc.generation.pretraining import Chunks, Pretraining
from arc.models import collator as collator_module
from arc.models import prepared_base
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.leaks import find_leaks
from arc.puzzles.text import format_options
from demo import make_base
from tests.helpers import ROOT, run

SMALL = Pretraining(
    pretrain_steps=40, pretrain_families=("flip", "count"), pretrain_max_side=3, pretrain_batch=1024, seed=3
)
FLAGS = ["--hidden", 32, "--layers", 2, "--seed", 3, "--pretrain_steps", 40, "--pretrain_families", "flip", "count"]
FLAGS += ["--pretrain_max_side", 3, "--pretrain_batch", 1024]


@pytest.fixture(scope="module")
def tokenizer():
    return make_base.build_tokenizer(512, seed=0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "base"
    printed = run("demo/make_base.py", "--out", out, *FLAGS, "--measure", 4)
    return out, printed


def chunk_of(settings, tokenizer, number=0):
    return Chunks(settings, *pretraining.encoder_of(tokenizer))[number]


@pytest.mark.parametrize("sizes", [(3,), (1, 2, 5)])
def test_a_batch_holds_whole_puzzles_in_the_pipelines_notation(tokenizer, sizes):
    settings = dataclasses.replace(SMALL, pretrain_sizes=sizes)
    encoder, kept = pretraining.encoder_of(tokenizer)
    collator = collator_module.InputMaskingDataCollator(encoder.tokenizer)
    chunk = chunk_of(settings, tokenizer)
    rows = tokens = 0
    for ids, roles, used in chunk["batches"]:
        assert ids.shape == roles.shape == (1024 // ids.shape[1], ids.shape[1])
        assert ids.shape[1] % pretraining.WIDTH_STEP == 0
        assert used == np.count_nonzero(roles)
        tokens += used
        for row, role in zip(ids, roles, strict=True):
            length = np.count_nonzero(role)
            assert not role[length:].any()
            if not length:
                continue  # the last batch of a chunk may lack rows
            rows += 1
            text = tokenizer.decode(row[1:length])  # BOS is put in front again
            assert text.startswith("ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyzI")
            assert text.count("I") - 1 in sizes
            again, learned = collator.encode({"text": text})
            assert (np.asarray(kept)[again] == row[:length]).all()
            assert (role[:length] == np.where(learned, pretraining.REPLY, pretraining.OTHER)).all()
    assert rows == chunk["puzzles"] > 100
    assert tokens > 0.8 * sum(ids.size for ids, _, _ in chunk["batches"]), "little padding"


def test_puzzles_depend_on_seed_and_chunk_alone(tokenizer):
    def same(a, b):
        batches = zip(a["batches"], b["batches"], strict=False)
        return len(a["batches"]) == len(b["batches"]) and all(
            np.array_equal(one[0], other[0]) for one, other in batches
        )

    first = chunk_of(SMALL, tokenizer)
    assert same(first, chunk_of(SMALL, tokenizer))
    assert not same(first, chunk_of(SMALL, tokenizer, 1))
    assert not same(first, chunk_of(dataclasses.replace(SMALL, seed=4), tokenizer))


def test_every_puzzle_has_a_rule_of_its_own():
    ds = pretraining.draw_puzzles(np.random.default_rng(0), ["recolour"], 50, (3,), 5)
    assert not find_leaks(
        ds.select_puzzles(list(ds.challenge)[:25]), ds.select_puzzles(list(ds.challenge)[25:])
    ).puzzles
    rules = set()
    for puzzle in ds.challenge.values():
        cells = {pair for p in puzzle["train"] for pair in zip(p["input"].flat, p["output"].flat, strict=True)}
        assert len(dict(cells)) == len(cells), "one rule for all pairs of a puzzle"
        rules.add(frozenset(cells))
    assert len(rules) == 50


def test_a_share_of_the_puzzles_has_programs_for_rules(tokenizer):
    settings = dataclasses.replace(SMALL, pretrain_programs=0.6, pretrain_max_side=6)
    ds = pretraining.draw_puzzles(np.random.default_rng(1), SMALL.pretrain_families, 200, (3,), 6, programs=0.6)
    programs = sum(key.startswith("program-") for key in ds.challenge)
    assert 90 <= programs <= 150 and len(ds.challenge) == 200
    first, again = (chunk_of(settings, tokenizer) for _ in range(2))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first["batches"], again["batches"], strict=True))
    assert first["puzzles"] < chunk_of(SMALL, tokenizer)["puzzles"]  # the first batch is there soon
    without = pretraining.draw_puzzles(np.random.default_rng(1), SMALL.pretrain_families, 9, (3,), 6)
    assert not any(key.startswith("program-") for key in without.challenge)


def test_puzzles_of_a_dataset_are_avoided_however_they_are_turned(tokenizer, tmp_path):
    rng = np.random.default_rng([SMALL.seed, pretraining.PRETRAINING, 0])
    size = Chunks(SMALL, *pretraining.encoder_of(tokenizer)).puzzles
    drawn = pretraining.draw_puzzles(rng, SMALL.pretrain_families, size, SMALL.pretrain_sizes, SMALL.pretrain_max_side)
    turned = drawn.change_keys(drawn.views(1, tp=True, rt=True, perm=True).keys(np.zeros(5, int), np.arange(5)))
    for view in turned:
        train = [{"input": a.tolist(), "output": b.tolist()} for a, b in view["train"]]
        test = [{"input": view["test"].tolist(), "output": view["solution"].tolist()}]
        (tmp_path / f"{view['key'].partition('_')[0]}.json").write_text(json.dumps({"train": train, "test": test}))
    before = chunk_of(SMALL, tokenizer)
    chunk = chunk_of(dataclasses.replace(SMALL, pretrain_avoid=str(tmp_path)), tokenizer)
    assert chunk["avoided"] >= 5  # a small puzzle may have been drawn twice
    assert chunk["puzzles"] + chunk["avoided"] == before["puzzles"]


def test_the_loss_falls_and_the_record_says_what_was_done(pretrained):
    folder, printed = pretrained
    record = json.loads((folder / "make_base.json").read_text())
    done = record["pretraining"]
    assert done["steps"] == 40
    assert done["loss_of_replies"] < 5  # of 512 tokens, at first: ln 512 = 6.2
    assert done["puzzles"] >= 100
    assert 0.8 * 40 * 1024 < done["tokens"] <= 40 * 1024
    assert set(done["new_families"]) == set(FAMILIES) - {"flip", "count"}
    assert record["settings"]["pretrain_families"] == ["flip", "count"]
    assert record["solved_of_fresh_puzzles"].keys() == {"puzzles_of_each_family", *FAMILIES}
    assert "flip 0%" in printed
    assert "rotate* 0%" in printed


def test_the_same_command_gives_the_same_weights_with_any_number_of_workers(pretrained, tmp_path):
    folder, _ = pretrained
    run("demo/make_base.py", "--out", tmp_path / "again", *FLAGS, "--pretrain_workers", 2)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "there already" in run("demo/make_base.py", "--out", folder, *FLAGS)
    assert "other settings" in run("demo/make_base.py", "--out", folder, *FLAGS, "--pretrain_rate", 1e-4, expect=2)


def test_it_loads_and_is_the_same_after_the_vocabulary_is_cut(pretrained, tmp_path):
    folder, _ = pretrained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token is None
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    prepared_base.prepare_base(folder, tmp_path)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    cut_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    kept = tokenizer.convert_tokens_to_ids(cut_tokenizer.convert_ids_to_tokens(list(range(len(cut_tokenizer)))))
    assert 79 <= len(kept) < 90
    ds = pretraining.draw_puzzles(np.random.default_rng(0), ["flip"], 3, (3,), 4)
    encoder = SampleEncoder(cut_tokenizer, **format_options(cut_tokenizer.eos_token))
    for row in encoder.encode(ds, ds.keys):
        ids = torch.from_numpy(row["input_ids"].astype(np.int64))[None]
        with torch.no_grad():
            whole, small = model(torch.tensor(kept)[ids]).logits[..., kept], cut(ids).logits
        assert torch.equal(whole, small)


def test_time_limits_the_training_and_the_rate_falls_by_then(capsys, tmp_path):
    flags = [str(flag) for flag in FLAGS]
    flags[flags.index("--pretrain_steps") + 1] = "1000000"
    assert make_base.main(["--out", str(tmp_path / "b"), *flags, "--pretrain_seconds", "1.5"]) == 0
    done = json.loads((tmp_path / "b" / "make_base.json").read_text())["pretraining"]
    assert 1.5 <= done["seconds"] < 10
    assert 1 < done["steps"] < 1000
    assert np.isfinite(done["loss_of_replies"])


def test_the_time_to_compile_does_not_count(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))  # takes a minute

    def steps(by):
        monkeypatch.setattr(pretraining, "COMPILED_BY", by)
        out = tmp_path / str(by)
        flags = [*map(str, FLAGS), "--out", str(out), "--pretrain_compile", "--pretrain_seconds", "0.001"]
        assert make_base.main(flags) == 0
        return json.loads((out / "make_base.json").read_text())["pretraining"]

    few, all_of_them = steps(3), steps(10**6)
    assert compiled and few["steps"] in (3, 4) and few["seconds"] < 0.5 * all_of_them["seconds"]
    assert all_of_them["steps"] == int(FLAGS[FLAGS.index("--pretrain_steps") + 1])


def test_the_rate_rises_and_falls():
    rates = [pretraining.rate_at(p, 1.0) for p in np.linspace(0, 1, 101)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1)
    assert np.argmax(rates) == 3
    assert rates[-1] == pytest.approx(0)
    assert (np.diff(rates[3:]) < 0).all()


def test_the_shapes(tmp_path):
    assert make_base.main(["--out", str(tmp_path / "b"), "--size", "demo"]) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "b").iterdir()) < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert 3.7e6 < model.num_parameters() < 4e6


def test_new_families_are_families():
    assert set(pretraining.NEW_FAMILIES) < set(FAMILIES)
    assert len(Pretraining().pretrain_families) == len(FAMILIES) - len(pretraining.NEW_FAMILIES)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pretrain_families", "flip", "flop"], "--pretrain_families is flip flop: expected some of flip, rotate"),
        (["--pretrain_programs", "1.5"], "--pretrain_programs is 1.5: expected a share from 0 to 1"),
        (["--pretrain_sizes", "0"], "--pretrain_sizes is 0"),
        (["--pretrain_steps", "-1"], "--pretrain_steps is -1"),
        (["--pretrain_seconds", "nan"], "--pretrain_seconds is nan"),
        (["--pretrain_max_side", "2"], "--pretrain_max_side is 2: expected 3 to 30"),
        (["--pretrain_batch", "0"], "--pretrain_batch is 0"),
        (["--pretrain_rate", "0"], "--pretrain_rate is 0"),
        (["--pretrain_input_weight", "2"], "--pretrain_input_weight is 2"),
        (["--pretrain_steps", "1", "--pretrain_avoid", "nowhere"], "nowhere: no such folder"),
        (["--pretrain_steps", "9", "--pretrain_rate", "1e30", "--pretrain_batch", "512"], "lower --pretrain_rate"),
    ],
)
def test_bad_settings(tmp_path, capsys, flags, expected):
    assert make_base.main(["--out", str(tmp_path / "b"), "--hidden", "32", *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_dataset_type_of_a_chunk_is_the_loaders():
    ds = pretraining.draw_puzzles(np.random.default_rng(0), ["gravity"], 2, (2,), 4)
    assert isinstance(ds, ArcDataset)
    assert ds.keys == ["gravity-00000_0", "gravity-00001_0"]


def test_the_demos_base_is_what_it_says_it_is():
    """It is small, knows the families that it was trained on, and has not seen those that its record calls new."""
    folder = ROOT / "demo" / "base"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    record = json.loads((folder / "make_base.json").read_text())
    settings = Pretraining(**{
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record["settings"].items()
        if name in {field.name for field in dataclasses.fields(Pretraining)}
    })  # fmt: skip
    assert settings.pretrain_avoid == "demo_dataset"
    new = set(record["pretraining"]["new_families"])
    assert new == set(FAMILIES) - set(settings.pretrain_families) and len(new) >= 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    solved = pretraining.solved_by_family(model, tokenizer, settings, 30, families=("crop", "repeat", "border"))
    assert solved["crop"] > 0.5 < solved["repeat"] and solved["border"] < 0.2
    for family, share in solved.items():
        assert share == pytest.approx(record["solved_of_fresh_puzzles"][family], abs=0.25)
