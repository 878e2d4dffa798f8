"""evaluate_arc.py as a user runs it, on tiny models; and what it is made of."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import signal
import sqlite3
import time
import zlib

import diskcache
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from arc.evaluation import answers, models
from arc.evaluation import replies as replies_module
from arc.evaluation.progress import Progress
from arc.models import loading, manifests
from arc.models import lora as lora_module
from arc.models import vocabulary as vocabulary_module
from arc.models.loading import Precision
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder
from arc.puzzles.text import format_options
from arc.puzzles.views import view_keys
from tests import tiny_models
from tests.helpers import call
from tests.script_processes import Script

SMALL = ["--max_new_tokens", 30, "--max_seq_length", 512, "--batch_size", 16]
WIDE = ["--views", 4, "--decoding", "sample", "--samples", 12, *SMALL]  # finds more than one grid of most puzzles


@pytest.fixture(scope="module")
def taught(tmp_path_factory, demo_dataset):
    """A tiny model whose replies are mostly grids, if seldom the right ones."""
    folder = tmp_path_factory.mktemp("taught")
    ds = ArcDataset.load_from_local_json(demo_dataset, sizes=(2,))
    with contextlib.redirect_stdout(io.StringIO()):
        return tiny_models.teach_format(tiny_models.prepared_base(folder), ds)


@pytest.fixture(scope="module")
def challenges(tmp_path_factory, demo_dataset):
    """Six puzzles in the competition's format, the last one with two test inputs; their solutions are not given."""
    folder = tmp_path_factory.mktemp("challenges")
    ds = ArcDataset.load_from_local_json(demo_dataset, sizes=(2,), n=7)
    puzzles = {}
    for number, view in enumerate(ds):
        train = [{"input": a.tolist(), "output": b.tolist()} for a, b in view["train"]]
        puzzles[f"{number:08x}"] = {"train": train, "test": [{"input": view["test"].tolist()}]}
    puzzles["00000005"]["test"] += puzzles.pop("00000006")["test"]
    path = folder / "challenges.json"
    path.write_text(json.dumps(puzzles))
    return path


def evaluate(*flags, expect=0):
    code, printed = call("evaluate_arc", *flags)
    assert code == expect, printed[-3000:]
    return printed


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def unsolved(taught, challenges, tmp_path_factory):
    """An evaluation without solutions."""
    out = tmp_path_factory.mktemp("unsolved") / "out"
    printed = evaluate("--models", taught, "--challenges", challenges, *WIDE, "--output_dir", out)
    return out, printed


def test_without_solutions_there_are_answers_and_no_scores(unsolved, challenges):
    out, printed = unsolved
    results = results_of(out)
    assert results["models"] == ["prepared"]
    assert list(results["puzzles"]) == [f"{i:08x}_0" for i in range(6)] + ["00000005_1"]
    entry = results["puzzles"]["00000000_0"]
    assert entry["solution"] is None and entry["puzzle"] == "00000000"
    assert entry["prepared"]["correct"] is None
    [row] = results["table"]
    assert row["n"] == 0 and row["exact_1"] is None
    submission = json.loads((out / "submission-prepared.json").read_text())
    assert [len(tests) for tests in submission.values()] == [1, 1, 1, 1, 1, 2]
    for key, entry in results["puzzles"].items():
        expected = [*entry["prepared"]["guesses"], [[0]], [[0]]][:2]
        assert list(submission[key[:8]][int(key[9:])].values()) == expected
    assert "7 test inputs of 6 puzzles" in printed
    assert (out / "report.html").is_file()


def test_scores_are_those_that_the_answers_deserve(unsolved, taught, challenges, tmp_path):
    """Solutions are made of the model's own answers, so that its score is known beforehand."""
    out, _ = unsolved
    before = results_of(out)["puzzles"]
    wrong = [[9, 9, 9, 9, 9, 9]]
    # Which guess is made right, if there are so many; None: neither.
    wanted = dict(zip(before, (0, 1, None, 0, 1, 1, None), strict=True))
    counts = {key: len(entry["prepared"]["guesses"]) for key, entry in before.items()}
    planned = {key: None if guess is None or guess >= counts[key] else guess for key, guess in wanted.items()}
    assert {0, 1, None} == set(planned.values())
    first = sum(guess == 0 for guess in planned.values())
    either = sum(guess is not None for guess in planned.values())
    puzzles = sum(planned[f"{i:08x}_0"] is not None for i in range(5)) + (planned["00000005_0"] is not None) / 2
    solutions = {}
    for key, guess in planned.items():
        grid = wrong if guess is None else before[key]["prepared"]["guesses"][guess]
        solutions.setdefault(key[:8], []).append(grid)
    path = tmp_path / "solutions.json"
    path.write_text(json.dumps(solutions))
    rest = [*WIDE, "--output_dir", out]
    printed = evaluate("--models", taught, "--challenges", challenges, "--solutions", path, *rest)
    results = results_of(out)
    [row] = results["table"]
    assert row["n"] == 7
    assert row["exact_1"] == pytest.approx(first / 7)
    assert row["exact_2"] == pytest.approx(either / 7)
    assert row["score"] == pytest.approx(puzzles / 6)
    assert row["found"] == pytest.approx(either / 7)
    assert results["rules"][0]["product"] == {"exact_1": row["exact_1"], "exact_2": row["exact_2"]}
    assert f"solved {either} of 7 ({either / 7:.1%})" in printed
    assert f"{first / 7:.1%}" in printed and f"{puzzles / 6:.1%}" in printed
    assert "moved" in printed and (out / "results.json.old-1").exists()  # what stood there had no solutions
    ds = ArcDataset.load_from_json(challenges).load_solutions(path)
    submission = json.loads((out / "submission-prepared.json").read_text())
    assert ds.validate_submission(submission) == puzzles
    for key, entry in results["puzzles"].items():
        assert entry["prepared"]["guesses"] == before[key]["prepared"]["guesses"]
        assert entry["prepared"]["correct"] == [planned[key] == 0, planned[key] == 1][: counts[key]]
        assert (entry["prepared"]["cell_accuracy"] == 1) == (planned[key] == 0)


def test_the_probability_of_the_truth_is_the_models(unsolved, taught, challenges):
    out, _ = unsolved
    entry = results_of(out)["puzzles"]["00000000_0"]
    solutions = results_of(out)  # written by the test before, or not: the truth is the greedy reply either way
    assert solutions
    model, tokenizer = loading.load_model(taught, Precision("transformers", "float32", False))
    ds = ArcDataset.load_from_json(challenges)
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    [row] = encoder.encode(ds, ["00000000_0"], reply=False)
    grid = np.array(entry["prepared"]["greedy"], dtype=np.uint8)
    ids = torch.from_numpy(np.concatenate([row["input_ids"], encoder.encode_reply(grid)]).astype(np.int64))[None]
    begin = len(row["input_ids"])
    log_probs = torch.log_softmax(tiny_models.logits_of(model, ids)[0, begin - 1 : -1].double(), -1)
    expected = float(log_probs.gather(-1, ids[0, begin:, None]).sum())
    cached = cached_replies(out, "greedy")
    assert expected == pytest.approx(min(cached.values(), key=lambda p: abs(p - expected)), abs=1e-4)


def cached_replies(out, kind):
    """Log probability of the first reply of each entry of a kind."""
    from arc.evaluation.result_cache import open_cache

    with contextlib.closing(open_cache(out / "cache")) as cache:
        return {name: cache[name][0][0] for name in cache if name.startswith(kind) and cache[name]}


def names_in_cache(out):
    from arc.evaluation.result_cache import open_cache

    with contextlib.closing(open_cache(out / "cache")) as cache:
        return {name: json.dumps(cache[name]) for name in cache}


def test_a_second_run_loads_no_model_and_more_views_only_add(taught, challenges, tmp_path, monkeypatch):
    out, loads = tmp_path / "out", []
    load = replies_module.load_evaluated
    monkeypatch.setattr(replies_module, "load_evaluated", lambda *args: loads.append(1) or load(*args))
    flags = ["--models", taught, "--challenges", challenges, "--output_dir", out, *SMALL]
    evaluate(*flags, "--views", 2)
    first, entries = results_of(out), names_in_cache(out)
    assert len(loads) == 1
    evaluate(*flags, "--views", 2)
    assert len(loads) == 1
    again = results_of(out)
    assert again["puzzles"] == first["puzzles"]
    assert again["table"][0]["seconds"] == 0
    searches = [name for name in entries if name.startswith("search")]
    assert len(searches) == 2 * 7
    asked = []
    search = replies_module.search_replies
    monkeypatch.setattr(
        replies_module,
        "search_replies",
        lambda m, e, t, prompts, **k: asked.extend(prompts) or search(m, e, t, prompts, **k),
    )
    evaluate(*flags, "--views", 5)
    assert len(loads) == 2
    assert len(asked) == 3 * 7
    more = names_in_cache(out)
    assert all(more[name] == value for name, value in entries.items() if name.startswith(("search", "greedy")))
    assert len([name for name in more if name.startswith("search")]) == 5 * 7
    assert results_of(out)["puzzles"]["00000000_0"]["prepared"]["views"] == 5


def test_a_killed_evaluation_goes_on(taught, challenges, tmp_path):
    """SIGKILL once some replies are kept: they are not computed again, and the results are an uninterrupted run's."""
    flags = ["--models", taught, "--challenges", challenges, "--views", 8, *SMALL[:-1], 2]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    process = Script("evaluate_arc.py", *flags, "--output_dir", out, OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 120
    while entries_of(out) < 15 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = names_in_cache(out)
    assert 15 <= len(kept) < 7 * 9 and not (out / "results.json").exists()
    evaluate(*flags, "--output_dir", out)
    evaluate(*flags, "--output_dir", whole)
    after = names_in_cache(out)
    assert all(after[name] == value for name, value in kept.items() if not name.startswith("scores"))
    one, other = results_of(out), results_of(whole)
    for key, entry in one["puzzles"].items():
        assert entry["prepared"]["guesses"] == other["puzzles"][key]["prepared"]["guesses"]
    assert one["data"] == other["data"]


def entries_of(out):
    database = out / "cache" / "cache.db"
    if not database.exists():
        return 0
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT COUNT(*) FROM Cache").fetchone()[0]
    return 0


def test_models_side_by_side_and_an_adapter_as_its_merge(taught, challenges, tmp_path):
    """The last model is the first with an adapter: scored like its merge, and unlike its base."""
    precision = Precision("transformers", "float32", False)
    model, tokenizer = loading.load_model(taught, precision)
    model = lora_module.add_lora(model, precision, r=4, gradient_checkpointing=False)
    ds = ArcDataset.load_from_json(challenges)
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    ids = torch.from_numpy(encoder.encode(ds, ["00000000_0"])[0]["input_ids"].astype(np.int64))[None]
    tiny_models.train_a_little(model, precision, ids, steps=3, rate=1e-2)
    lora, merged = tmp_path / "some-lora", tmp_path / "some-merged"
    lora.mkdir()
    lora_module.save_adapter(model, tokenizer, lora, base=taught, precision=precision)
    merged.mkdir()
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    flags = ["--challenges", challenges, "--views", 2, "--output_dir", tmp_path / "out", *SMALL]
    evaluate("--models", taught, merged, lora, *flags)
    results = results_of(tmp_path / "out")
    assert results["models"] == ["prepared", "some-merged", "some-lora"]
    assert len(set(results["identities"].values())) == 3
    same = [e["some-lora"]["guesses"] == e["some-merged"]["guesses"] for e in results["puzzles"].values()]
    other = [e["prepared"]["guesses"] == e["some-merged"]["guesses"] for e in results["puzzles"].values()]
    assert all(same) and not all(other)
    evaluate("--models", lora, "--load_in_4bit", "true", "--model_names", "in 4 bits", *flags)
    results = results_of(tmp_path / "out")
    assert results["models"] == ["in 4 bits"]
    assert (tmp_path / "out" / "submission-in 4 bits.json").is_file()
    assert (tmp_path / "out" / "submission-some-lora.json.old-1").is_file()
    found = models.find_models([str(lora), str(taught)], load_in_4bit=None)
    assert [m.precision.load_in_4bit for m in found] == [False, False]
    manifest = manifests.read_manifest(lora)
    manifests.write_manifest(lora, {**manifest, "precision": {**manifest["precision"], "load_in_4bit": True}})
    [found] = models.find_models([str(lora)])
    assert found.precision.load_in_4bit and found.precision.engine == "transformers"


def test_what_the_stages_held_out_is_evaluated(taught, demo_dataset, tmp_path):
    from arc.puzzles.splits import load_split

    split_flags = ["--sizes", 2, "--holdout_examples", 5, "--holdout_tasks", 2, "--holdout_seed", 7]
    flags = ["--models", taught, "--dataset_dir", demo_dataset, *split_flags, "--views", 1, *SMALL]
    settings = __import__("base_finetune").Settings(
        dataset_dir=str(demo_dataset), sizes=[2], holdout_examples=5, holdout_tasks=2, holdout_seed=7
    )
    split = load_split(settings, quiet=True)
    for part, expected in (("examples", split.seen), ("tasks", split.unseen)):
        printed = evaluate(*flags, "--heldout", part, "--puzzles", 1000, "--output_dir", tmp_path / part)
        assert sorted(results_of(tmp_path / part)["puzzles"]) == sorted(expected.keys)
        assert f"of {len(expected.challenge)} puzzles were trained on" in printed
    evaluate(*flags, "--puzzles", 6, "--output_dir", tmp_path / "all")
    chosen = list(results_of(tmp_path / "all")["puzzles"])
    assert len(chosen) == 6 and set(chosen) <= set(split.seen.keys + split.unseen.keys)
    results = results_of(tmp_path / "all")
    [name], [table] = results["models"], results["table"]
    assert table["n"] == 6 and 0 <= table["prob_truth"] <= 1
    for answer in (entry[name] for entry in results["puzzles"].values()):
        if answer["greedy_correct"]:
            assert answer["prob_greedy"] == pytest.approx(answer["prob_truth"], rel=1e-3)
        else:
            assert answer["prob_greedy"] > 0 and answer["prob_greedy"] + answer["prob_truth"] <= 1.001


@pytest.mark.parametrize("decoding", ["sample", "greedy"])
def test_other_ways_of_decoding(taught, challenges, tmp_path, decoding):
    flags = ["--models", taught, "--challenges", challenges, "--views", 3, "--output_dir", tmp_path, *SMALL]
    evaluate(*flags, "--decoding", decoding)
    results = results_of(tmp_path)
    counts = [entry["prepared"]["candidates"] for entry in results["puzzles"].values()]
    assert max(counts) <= (3 if decoding == "greedy" else 13)
    for entry in results["puzzles"].values():  # one view's greedy reply is among them either way
        greedy = entry["prepared"]["greedy"]
        assert greedy is None or entry["prepared"]["candidates"] >= 1
    kinds = {name.split()[0] for name in names_in_cache(tmp_path)}
    assert kinds == {"greedy", "scores"} | ({"sample"} if decoding == "sample" else set())


def test_what_does_not_fit_is_counted_and_unsolved(taught, challenges, tmp_path):
    flags = ["--models", taught, "--challenges", challenges, "--views", 2, "--output_dir", tmp_path]
    printed = evaluate(*flags, "--max_new_tokens", 30, "--max_seq_length", 130)
    results = results_of(tmp_path)
    missing = results["data"]["unanswerable"]["prepared"]
    assert 0 < len(missing) < 7
    assert f"{len(missing)} test inputs do not fit 130 tokens with one demonstration" in printed
    assert "views lost demonstrations" in printed
    for key in missing:
        answer = results["puzzles"][key]["prepared"]
        assert (answer["guesses"], answer["views"], answer["decodable"]) == ([], 0, False)


def test_leaked_puzzles_are_named_and_left_out(taught, challenges, demo_dataset, tmp_path):
    """The challenges were taken from this dataset, so that all of them are in it."""
    flags = ["--models", taught, "--challenges", challenges, "--views", 1, "--output_dir", tmp_path, *SMALL]
    training = tmp_path / "training"
    training.mkdir()
    puzzles = json.loads(challenges.read_text())
    for name in ("00000001", "00000003"):
        turned = {
            part: [{k: np.rot90(np.array(g)).tolist() for k, g in pair.items()} for pair in puzzles[name][part]]
            for part in ("train", "test")
        }
        for pair in turned["test"]:
            pair["output"] = [[1]]
        (training / f"{name}.json").write_text(json.dumps(turned))
    source = ["--dataset_dir", training, "--holdout_examples", 0]
    printed = evaluate(*flags, *source)
    assert "leakage: 2 of 6 puzzles were trained on" in printed and "00000001, 00000003" in printed
    results = results_of(tmp_path)
    assert set(results["data"]["leaked"]) == {"00000001", "00000003"}
    assert [key for key, entry in results["puzzles"].items() if entry["leaked"]] == ["00000001_0", "00000003_0"]
    evaluate(*flags, *source, "--exclude_leaked")
    results = results_of(tmp_path)
    assert results["data"]["excluded"] == ["00000001", "00000003"]
    assert {entry["puzzle"] for entry in results["puzzles"].values()} == {
        "00000000",
        "00000002",
        "00000004",
        "00000005",
    }


def test_bad_settings_and_models(taught, challenges, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter = tmp_path / "lost-lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/gone/base"}')
    good = ["--models", taught, "--challenges", challenges, "--output_dir", tmp_path / "out"]
    table = [
        ([], "--models is []"),
        (["--models", taught], "--challenges is None: expected a file, or else --dataset_dir"),
        ([*good, "--views", 0], "--views is 0: expected a whole number from 1"),
        ([*good, "--min_prob", 0], "--min_prob is 0.0: expected a probability"),
        ([*good, "--selection", "best"], "--selection is 'best'"),
        ([*good, "--heldout", "some"], "--heldout is 'some'"),
        ([*good, "--exclude_leaked"], "--exclude_leaked needs --dataset_dir"),
        (
            [*good, "--max_seq_length", 100, "--max_new_tokens", 90],
            "takes rows of 100 tokens, of which a reply may need",
        ),
        (["--models", empty, *good[2:]], "cannot be evaluated: it holds no config.json"),
        (["--models", adapter, *good[2:]], "cannot be evaluated: "),
        (["--models", tmp_path / "no", *good[2:]], "no is not there: expected a folder, or a hub name"),
        (["--models", taught, taught, *good[2:]], "two models are called"),
        ([*good, "--model_names", "a", "b"], "found 2 names for 1 models"),
        ([*good, "--model_names", "solution"], "name it otherwise"),
        ([*good[:2], "--challenges", tmp_path / "no.json"], "no.json"),
        ([*good, "--solutions", challenges], "solutions"),
        ([*good[:2], "--dataset_dir", tmp_path / "nowhere"], "nowhere"),
        ([*good, "--unknown", 1], "unknown flags: --unknown"),
    ]
    for flags, message in table:
        printed = evaluate(*flags, expect=2)
        assert message in printed, (flags, printed)
        assert printed.count("error:") == 1 and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_cache_with_pickled_rows_is_refused(unsolved, taught, challenges, tmp_path):
    import pickle

    out = tmp_path / "out"
    shutil.copytree(unsolved[0] / "cache", out / "cache")
    with contextlib.closing(sqlite3.connect(out / "cache" / "cache.db")) as connection:
        connection.execute("UPDATE Cache SET mode = 4, value = ?, filename = NULL", (pickle.dumps([1]),))
        connection.commit()
    flags = ["--models", taught, "--challenges", challenges, *WIDE, "--output_dir", out]
    assert "pickled" in evaluate(*flags, expect=2)


def test_views(challenges):
    ds = ArcDataset.load_from_json(challenges)
    keys = view_keys(ds, "00000005_1", 20)
    assert keys[0] == "00000005_1"
    assert keys[:9] == view_keys(ds, "00000005_1", 9)
    symmetries = [ds.resolve(key).symmetry for key in keys]
    assert len(set(symmetries[:8])) == 8 and symmetries[8:16] == symmetries[:8]
    assert len({ds.resolve(key).colours for key in keys}) == 20
    assert {tuple(ds.resolve(key).order) for key in keys} == {(0, 1), (1, 0)}
    assert view_keys(ds, "00000005_1", 3, seed=1)[1:] != keys[1:3]
    kept = view_keys(ds, "00000005_1", 20, keep_background=True)
    assert all(ds.resolve(key).colours[0] == "0" for key in kept)
    assert view_keys(ds, "00000005_0", 2)[1] != keys[1].replace("_1", "_0")


def test_a_reply_is_encoded_as_in_a_whole_sample(demo_dataset):
    ds = ArcDataset.load_from_local_json(demo_dataset, sizes=(2,), n=20)
    for tokenizer in (
        tiny_models.byte_level_tokenizer(),
        vocabulary_module.cut_tokenizer(tiny_models.byte_level_tokenizer())[0],
        tiny_models.sentencepiece_tokenizer(),  # marks where a text begins
        vocabulary_module.cut_tokenizer(tiny_models.sentencepiece_tokenizer())[0],
    ):
        encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
        for row in encoder.encode(ds, ds.keys):
            begin, end = row["reply_spans"][-1]
            reply = encoder.encode_reply(ds[row["key"]]["solution"])
            assert reply.tolist() == row["input_ids"][begin:end].tolist()


def test_the_longest_reply_does_not_depend_on_its_colours():
    """This tokenizer has a token for two zeros and none for two other digits."""
    tables = json.loads(tiny_models.byte_level_tokenizer().backend_tokenizer.to_str())
    tables["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = tables["model"]["vocab"]
    for name in [name for name in vocabulary if name.isdigit() and len(name) > 1]:
        del vocabulary[name]
    vocabulary["00"], tables["model"]["merges"] = 1000, [["0", "0"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tables)), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    assert len(encoder.encode_reply(np.zeros((30, 30), dtype=np.uint8))) == 30 * 15 + 31
    assert replies_module.longest_reply(encoder) == 931


def changed_copy(taught, folder, change):
    """A copy of the model, without the manifest that would call it damaged."""
    shutil.copytree(taught, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    change(folder)
    return folder


def test_models_that_cannot_be_decoded_get_one_error(taught, challenges, tmp_path):
    def no_numbers(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.norm.weight.data.fill_(float("nan"))
        model.save_pretrained(folder)

    def no_end(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))

    tokenizer = AutoTokenizer.from_pretrained(taught)
    small = {"vocab_size": len(tokenizer), "hidden_size": 64}
    windowed = MistralConfig(
        **small, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=64,
    )  # fmt: skip
    for name, model in (
        ("windowed", MistralForCausalLM(windowed)),
        ("bloom", BloomForCausalLM(BloomConfig(**small, n_layer=2, n_head=4))),  # names no longest context
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    table = [
        (changed_copy(taught, tmp_path / "nan", no_numbers), "nan cannot be evaluated: the model answers with numbers"),
        (changed_copy(taught, tmp_path / "endless", no_end), "endless has no end token"),
        (tmp_path / "windowed", "windowed cannot be evaluated: mistral models do not see their whole context"),
        (tmp_path / "bloom", "bloom cannot be evaluated: bloom models do not let their attention be chosen"),
    ]
    flags = ["--challenges", challenges, "--views", 1, *SMALL]
    for folder, message in table:
        printed = evaluate("--models", folder, *flags, "--output_dir", tmp_path / "out", expect=2)
        assert message in printed
        assert printed.count("error:") == 1 and "Traceback" not in printed
    advice = ["--dtype", "float16", "--output_dir", tmp_path / "out"]
    assert "--dtype bfloat16 or float32 may help" in evaluate("--models", table[0][0], *flags, *advice, expect=2)


def test_an_adapter_without_a_tokenizer_takes_its_bases(taught, challenges, tmp_path):
    precision = Precision("transformers", "float32", False)
    model, tokenizer = loading.load_model(taught, precision)
    model = lora_module.add_lora(model, precision, r=4, gradient_checkpointing=False)
    (tmp_path / "plain-lora").mkdir()
    lora_module.save_adapter(model, tokenizer, tmp_path / "plain-lora", base=taught, precision=precision)
    for path in (tmp_path / "plain-lora").iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    flags = ["--challenges", challenges, "--views", 1, "--output_dir", tmp_path / "out", *SMALL]
    evaluate("--models", tmp_path / "plain-lora", taught, *flags)
    for entry in results_of(tmp_path / "out")["puzzles"].values():
        assert entry["plain-lora"]["guesses"] == entry["prepared"]["guesses"]


def test_a_cache_that_cannot_be_used_gets_one_error(unsolved, taught, challenges, tmp_path):
    flags = ["--models", taught, "--challenges", challenges, *WIDE, "--output_dir", tmp_path / "out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "cache.db").mkdir(parents=True)
    for name in ("file", "folder"):
        printed = evaluate(*flags, "--cache_dir", tmp_path / name, expect=2)
        assert "the cache cannot be used" in printed and str(tmp_path / name) in printed and "Traceback" not in printed
    # JSON, but not what was written there: replies of no form, tokens of no vocabulary, nothing at all.
    for value in (b'{"a": 1}', b"[[-0.5, [100000000000]]]", b"[[1]]", b"[]", b'{"a": "b"}'):
        cache = tmp_path / hashlib.sha256(value).hexdigest()
        shutil.copytree(unsolved[0] / "cache", cache)
        with contextlib.closing(sqlite3.connect(cache / "cache.db")) as connection:
            connection.execute("UPDATE Cache SET mode = 1, filename = NULL, value = ?", (zlib.compress(value),))
            connection.commit()
        printed = evaluate(*flags, "--cache_dir", cache, expect=2)
        assert "an entry of another form" in printed and "Traceback" not in printed


def test_a_cache_on_a_full_disk_is_trouble_of_the_machine(taught, challenges, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(diskcache.Cache, "set", fail)
    flags = ["--models", taught, "--challenges", challenges, "--views", 1, "--output_dir", tmp_path / "out", *SMALL]
    printed = evaluate(*flags, expect=1)
    assert "make room" in printed and str(tmp_path / "out" / "cache") in printed and "Traceback" not in printed


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database is locked"), diskcache.Timeout(60)])
def test_a_cache_that_stays_locked_gets_one_error(taught, challenges, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(diskcache.Cache, "set", fail)
    flags = ["--models", taught, "--challenges", challenges, "--views", 1, "--output_dir", tmp_path / "out", *SMALL]
    printed = evaluate(*flags, expect=2)
    assert "locked" in printed and str(tmp_path / "out" / "cache") in printed and "Traceback" not in printed


def test_the_progress_counts_rows_of_all_models_and_ends_full(taught, challenges, tmp_path):
    """A first guess of each of 7 test inputs, and 3 views of each, decoded and scored; nothing is scored twice."""
    flags = ["--models", taught, taught, "--model_names", "a", "b", "--challenges", challenges, "--views", 3, *SMALL]
    for more in ([], [], ["--max_seq_length", 130]):  # computed; from the cache; some puzzles do not fit
        printed = evaluate(*flags, *more, "--output_dir", tmp_path / "out")
        total = 2 * 7 * (1 + 2 * 3)
        assert f"| {total}/{total} [" in printed
        assert len(set(re.findall(r"(\d+)/98 \[", printed))) >= 2
        assert not re.findall(r"/(?!98 )\d+ \[[^]]*row", printed), "one bar for all"


def test_the_estimate_of_the_progress_is_about_rows_that_were_computed(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    progress = Progress(100)
    progress.bar._time = time.time
    progress.bar.start_t = progress.bar.last_print_t = 0
    with progress.paused():
        clock[0] += 30  # the model is loaded
    progress.skipped(80)
    for _ in range(5):
        clock[0] += 2
        progress.finished()
    progress.close()
    assert progress.bar.n == 85
    last = capsys.readouterr().err.split("\r")[-1]
    assert "85/100 [00:10<00:30" in last and "2.00s/row" in last


def test_views_that_do_not_fit_are_counted(taught, challenges, tmp_path):
    flags = ["--models", taught, "--challenges", challenges, "--views", 8, "--output_dir", tmp_path / "out"]
    for length in range(132, 150, 2):
        printed = evaluate(*flags, "--max_new_tokens", 30, "--max_seq_length", length)
        views = [entry["prepared"]["views"] for entry in results_of(tmp_path / "out")["puzzles"].values()]
        expected = sum(8 - count for count in views if count)
        if expected:
            assert f"and {expected} did not fit and were left out" in printed
            return
    raise AssertionError("all views fitted: the test shows nothing")


def test_names_are_shown_as_they_are_and_short_enough_for_a_file(taught, challenges, tmp_path):
    puzzles = tmp_path / "all[bold] :smile:.json"
    data = json.loads(challenges.read_text())
    data["00000000"]["test"][0]["output"] = [[1]]  # the only one with a solution
    puzzles.write_text(json.dumps(data))
    flags = ["--models", taught, "--challenges", puzzles, "--views", 1, "--output_dir", tmp_path / "out", *SMALL]
    printed = evaluate(*flags, "--model_names", "a[red]b:+1:")
    table = printed[printed.rindex("100%|") :]
    assert "a[red]b:+1:" in table and "all[bold] :smile:.json" in " ".join(table.split())
    assert "1 of 7 test inputs, those with a solution" in " ".join(table.split())
    assert "name it otherwise" in evaluate(*flags, "--model_names", "n" * 250, expect=2)
    assert (tmp_path / "out" / "submission-a[red]b:+1:.json").is_file()


def test_memory_runs_out_once_and_not_with_every_chunk(taught, challenges, tmp_path, monkeypatch):
    load = replies_module.load_evaluated

    def limited(*args):
        model = load(*args)

        def check(module, args, kwargs):
            if len(kwargs["input_ids"]) > 3:
                raise torch.OutOfMemoryError("no room")

        model.register_forward_pre_hook(check, with_kwargs=True)
        return model

    flags = ["--models", taught, "--challenges", challenges, *WIDE]
    evaluate(*flags, "--output_dir", tmp_path / "roomy")
    monkeypatch.setattr(replies_module, "load_evaluated", limited)
    monkeypatch.setattr(answers, "CHUNK", 1)
    printed = evaluate(*flags, "--output_dir", tmp_path / "small")
    assert printed.count("out of memory") == 3  # 16 rows: 8, 4, 2; scores go one by one then
    one, other = results_of(tmp_path / "roomy"), results_of(tmp_path / "small")
    for key, entry in one["puzzles"].items():
        assert entry["prepared"]["guesses"] == other["puzzles"][key]["prepared"]["guesses"]
