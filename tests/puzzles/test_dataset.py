"""`ArcDataset`: vectors written by hand from the key grammar, round trips over all transforms, and tokenizers."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from arc.puzzles import files
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.encoding import SampleEncoder, TrainingSamples
from arc.puzzles.text import find_reply_spans, format_options
from tests.helpers import SHARED

EOS = "<|eot_id|>"
FORMAT = format_options(EOS)
COURSE = SHARED / "data" / "course_dataset"
OFFICIAL = COURSE.parent / "arc_agi_1"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz"

GRID = [[0, 1, 2], [3, 4, 5]]
PUZZLE = {
    "train": [
        {"input": [[1, 2]], "output": [[3]]},
        {"input": [[4], [5]], "output": [[6, 7]]},
        {"input": [[8]], "output": [[9, 0], [1, 2]]},
    ],
    "test": [{"input": GRID}, {"input": [[7]]}],
}
SOLUTIONS = [[[1, 0], [2, 3], [4, 5]], [[6]]]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("ARC_LOADER_CACHE", "off")


def toy():
    return ArcDataset({"toy": PUZZLE}, {"toy": SOLUTIONS}, is_orig=True)


def random_pairs(count, seed, side=6):
    rng = np.random.default_rng(seed)
    shapes = rng.integers(1, side + 1, (count, 2, 2))
    grids = [[rng.integers(0, 10, shape).tolist() for shape in pair] for pair in shapes]
    return [{"input": a, "output": b} for a, b in grids]


@pytest.fixture
def folder(tmp_path):
    for number, count in enumerate((23, 9, 30)):
        (tmp_path / f"task{number}.json").write_text(json.dumps(random_pairs(count, number)))
    return tmp_path


def build_tokenizer(merges=(), bos=True):
    """One token per character, and the given merges; digits are grouped in threes before merging, as Llama 3 does."""
    characters = [*LETTERS, *"IO0123456789\n+/-="]
    tokens = [*characters, *(a + b for a, b in merges), "<|begin|>", EOS, "<|pad|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|\n|[^\n\d]+"), "isolated")
    if bos:
        special = [("<|begin|>", vocabulary["<|begin|>"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token=EOS, pad_token="<|pad|>"
    )


SINGLE = build_tokenizer()
MERGING = build_tokenizer([("1", "2"), ("12", "3"), ("0", "0"), ("00", "0"), ("+", "/"), ("\n", "\n"), ("z", "I")])


# -- keys and transforms, by hand

VECTORS = [
    # transforms             [[0, 1, 2], [3, 4, 5]] becomes
    ("", [[0, 1, 2], [3, 4, 5]]),
    (".tp", [[0, 3], [1, 4], [2, 5]]),
    (".rt", [[2, 5], [1, 4], [0, 3]]),
    (".tp.rt", [[3, 4, 5], [0, 1, 2]]),
    (".rt.tp", [[2, 1, 0], [5, 4, 3]]),
    (".rt.rt", [[5, 4, 3], [2, 1, 0]]),
    (".rt.rt.rt", [[3, 0], [4, 1], [5, 2]]),
    (".tp.rt.rt", [[5, 2], [4, 1], [3, 0]]),
    (".perm1023456789", [[1, 0, 2], [3, 4, 5]]),
    (".perm9012345678", [[9, 0, 1], [2, 3, 4]]),
    (".perm1203456789.perm0214356789", [[2, 1, 0], [4, 3, 5]]),
    (".rt.perm9012345678.ex2-0", [[1, 4], [0, 3], [9, 2]]),
]


@pytest.mark.parametrize(("transforms", "expected"), VECTORS)
def test_transforms_by_hand(transforms, expected):
    ds, steps = toy(), transforms.split(".")[1:]
    assert ds["toy_0" + transforms]["test"].tolist() == expected
    assert ArcDataset.transform_array(np.array(GRID), steps).tolist() == expected
    assert ArcDataset.transform_array(np.array(expected), steps, invert=True).tolist() == GRID
    rows = SampleEncoder(SINGLE, **FORMAT).encode(ds, ["toy_0" + transforms], reply=False)
    text = "".join(SINGLE.convert_ids_to_tokens(rows[0]["input_ids"]))
    assert text.endswith("I" + "\n".join("".join(map(str, row)) for row in expected) + "\n+/-=O")


@pytest.mark.parametrize(
    ("order", "inputs"),
    [
        ("", [[[1, 2]], [[4], [5]], [[8]]]),
        (".ex2-0-1", [[[8]], [[1, 2]], [[4], [5]]]),
        (".ex1", [[[4], [5]]]),
        (".ex2-0-1.ex1-0", [[[1, 2]], [[8]]]),
    ],
)
def test_order_of_demonstrations_by_hand(order, inputs):
    assert [a.tolist() for a, _ in toy()["toy_1" + order]["train"]] == inputs


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nope_0", "no puzzle 'nope'"),
        ("toy_2", "no test input 2"),
        ("toy_x", "test index 'x'"),
        ("toy_²", "test index"),
        ("toy_0.flip", "transform 'flip'"),
        ("toy_0.", "transform ''"),
        ("toy_0.perm012345678", "digits 0 to 9 once"),
        ("toy_0.perm0123456788", "digits 0 to 9 once"),
        ("toy_0.ex3", "3 demonstrations"),
        ("toy_0.ex0-0", "different numbers"),
        ("toy_0.ex", "different numbers"),
        ("toy_0.ex1.ex1", "1 demonstrations"),
        ("toy_0.ex-1", "different numbers"),
    ],
)
def test_wrong_keys_are_refused(key, message):
    ds = toy()
    for use in (
        ds.__getitem__,
        lambda k: ds.get_task(k, **FORMAT),
        lambda k: SampleEncoder(SINGLE, **FORMAT).encode(ds, [k]),
    ):
        with pytest.raises(ValueError, match=message):
            use(key)


def test_text_to_the_letter():
    # Turned, [[4], [5]] is [[4, 5]], [[6, 7]] is [[7], [6]], [[1, 2]] is [[2], [1]]; then 0 and 1 change places.
    key, task = toy().get_task("toy_0.rt.perm1023456789.ex1-0", **FORMAT)
    assert key == "toy_0.rt.perm1023456789.ex1-0"
    train = f"{LETTERS}I45\n+/-=O7\n6\n{EOS}I2\n0\n+/-=O3\n{EOS}"
    query, reply = "I25\n04\n13\n+/-=O", f"135\n024\n{EOS}"
    assert task == {
        "key": key,
        "train": train,
        "query": query,
        "input": train + query,
        "reply": reply,
        "text": train + query + reply,
    }


def test_text_of_a_puzzle_without_solution_or_test():
    ds = ArcDataset({"a": {"train": PUZZLE["train"][:1], "test": [{"input": [[7]]}]}}, is_orig=True)
    train = f"{LETTERS}I12\n+/-=O3\n{EOS}"
    assert ds.fmt_task("a_0", **FORMAT) == {
        "key": "a_0",
        "train": train,
        "query": "I7\n+/-=O",
        "input": train + "I7\n+/-=O",
        "text": train,
    }
    guess = ds.fmt_task("a_0.tp", reply=[[1, 2]], **FORMAT)
    assert guess["text"] == train.replace("I12", "I1\n2") + f"I7\n+/-=O1\n2\n{EOS}"
    alone = ds.remove_test_data()
    assert alone.keys == ["a"]
    assert alone.fmt_task("a", **FORMAT) == {"key": "a", "train": train, "query": "", "input": "", "text": train}
    with pytest.raises(ValueError, match="no test input"):
        SampleEncoder(SINGLE, **FORMAT).encode(alone, ["a"], reply=False)


def test_symmetries_in_upstream_order():
    views = toy().change_keys(["toy_0", "toy_1"]).views(0, tp="all", rt="all")
    expected = ["", ".tp", ".rt", ".tp.rt", ".rt.rt", ".tp.rt.rt", ".rt.rt.rt", ".tp.rt.rt.rt"]
    assert [views.key(0, i) for i in range(16)] == [k + s for k in ("toy_0", "toy_1") for s in expected]
    assert toy().augment_keys(["toy_0", "toy_1"], seed=0, tp="all") == ["toy_0", "toy_1", "toy_0.tp", "toy_1.tp"]
    assert toy().augment(1, n=2, rt="all").keys[:8] == 2 * ["toy_0", "toy_0.rt", "toy_0.rt.rt", "toy_0.rt.rt.rt"]


# -- round trips

GRIDS = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1)).map(
    lambda t: np.random.default_rng(t[2]).integers(0, 10, t[:2]).astype(np.uint8)
)
STEPS = st.lists(
    st.one_of(st.just("tp"), st.just("rt"), st.permutations(range(10)).map(lambda p: "perm" + "".join(map(str, p)))),
    max_size=6,
)


@given(grid=GRIDS, other=GRIDS, steps=STEPS, order=st.permutations(range(3)))
@settings(max_examples=200, deadline=None)
def test_augment_format_decode_is_the_original(grid, other, steps, order):
    train = [{"input": other, "output": grid}, {"input": grid, "output": other}, {"input": [[1]], "output": grid}]
    ds = ArcDataset({"p": {"train": train, "test": [{"input": other}]}}, {"p": [grid]})
    key = ".".join(["p_0", *steps, "ex" + "-".join(map(str, order))])
    task = ds.fmt_task(key, **FORMAT)
    for reply, end in ((task["reply"], FORMAT["reply_end"]), (task["reply"].removesuffix(EOS), None)):
        decoded, correct, info = ds.decode(reply, "\n", key=key, reply_end=end)
        assert (correct, info) == (True, "ALL_CORRECT")
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, grid)
    spans = find_reply_spans(task["text"], FORMAT["reply_beg"], FORMAT["reply_end"])
    shown = ds[key]
    assert [task["text"][a:b] for a, b in spans] == [
        ArcDataset.fmt_output(output, FORMAT["reply_end"], lines_sep="\n")
        for output in [*(output for _, output in shown["train"]), shown["solution"]]
    ]
    row = SampleEncoder(SINGLE, **FORMAT).encode(ds, [key])[0]
    assert row["input_ids"].tolist() == SINGLE(task["text"])["input_ids"]


@given(
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 50),
    tp=st.sampled_from([False, True, "all"]),
    rt=st.sampled_from([False, True, "all"]),
    perm=st.booleans(),
    keep=st.booleans(),
    shfl=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_every_view_is_a_valid_key(seed, epoch, tp, rt, perm, keep, shfl, data):
    ds = toy().change_keys(["toy_0", "toy_1.ex2-1", "toy_0.tp"])
    views = ds.views(seed, tp=tp, rt=rt, perm=perm, keep_background=keep, shfl_ex=shfl)
    index = data.draw(st.integers(0, len(views) - 1))
    key = views.key(epoch, index)
    base = ds.keys[index // len(views.symmetries)]
    assert key.startswith(base)
    assert len(ds[key]["train"]) == len(ds[base]["train"])
    colours = [part[4:] for part in key.split(".") if part.startswith("perm")]
    assert len(colours) == perm
    assert not keep or all(c[0] == "0" for c in colours)


def test_a_share_of_the_views_keeps_its_colours():
    ds = toy()
    whole = ds.views(3, tp="all", rt=True, perm=True, shfl_ex=True)
    part = ds.views(3, tp="all", rt=True, perm=True, shfl_ex=True, perm_share=0.5)
    epochs, indices = (grid.ravel() for grid in np.meshgrid(np.arange(500), np.arange(len(whole)), indexing="ij"))
    keys, kept = whole.keys(epochs, indices), part.keys(epochs, indices)
    own = [".perm" not in key for key in kept]
    assert abs(np.mean(own) - 0.5) < 0.03
    # All else of a view is drawn as before, whatever its colours.
    without = [".".join(p for p in key.split(".") if not p.startswith("perm")) for key in keys]
    assert kept == [plain if one else key for plain, key, one in zip(without, keys, own, strict=True)]
    assert all(".perm" not in key for key in ds.views(3, perm=True, perm_share=0.0).keys(epochs[:9], indices[:9] % 2))
    with pytest.raises(ValueError, match="perm_share is 1.5"):
        ds.views(3, perm=True, perm_share=1.5)


# -- decoding

HOSTILE = [
    "1x2\n\n3y4", "junk12\nmore34 text", "12\n34 text", "١٢\n٣٤", "１２\n３４", "²³\n¹²", "𝟙𝟚", "一二", "\ud800",
    "", "\n", "12\n\n", "\n12", "12\n34\n\n56\n78", "12\n\t\n34", "12\r\n34\r\n", "12\n345",
    "\n".join(["1"] * 31), "1" * 31, "12 \n34", " 12\n34", "1,2\n3,4", "[[1,2],[3,4]]", "-1\n23", "1.0", "+1", "1_2",
    "0x1", "12\x0034", "12\u202834", "12\v34", "12\n34" + EOS, "I12\n+/-=O",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_do_not_decode(text):
    grid, correct, info = toy().decode(text, "\n", key="toy_0")
    assert grid is None
    assert correct is False
    assert info.startswith("cant_decode: ")


@given(st.text(alphabet=st.one_of(st.sampled_from("0123456789\n \r<|eot_id|>"), st.characters()), max_size=80))
@settings(max_examples=300, deadline=None)
def test_decoding_never_raises_and_reads_nothing_but_grids(text):
    ds = toy()
    for end in (None, FORMAT["reply_end"], EOS):
        for key in (None, "toy_0.tp"):
            grid, correct, info = ds.decode(text, "\n", key=key, reply_end=end)
            if grid is None:
                assert correct is False
                assert info.startswith("cant_decode: ")
            else:
                written = text if end is None else text[: text.index(end)]
                view = grid if key is None else grid.T
                assert written.removesuffix("\n") == "\n".join("".join(map(str, row)) for row in view.tolist())


@pytest.mark.parametrize(
    ("text", "end", "result"),
    [
        ("10\n23\n45", None, "ALL_CORRECT"),
        ("10\n23\n45\n", None, "ALL_CORRECT"),
        (f"10\n23\n45\n{EOS}", "\n" + EOS, "ALL_CORRECT"),
        (f"10\n23\n45\n{EOS}junk\n{EOS}", "\n" + EOS, "ALL_CORRECT"),
        (f"10\n23\n45\n{EOS}", EOS, "ALL_CORRECT"),
        ("10\n23\n45\n", "\n" + EOS, "cant_decode: no end of reply"),
        ("10\n23\n45", EOS, "cant_decode: no end of reply"),
        (f"10\n23\n45\n\n{EOS}", "\n" + EOS, "cant_decode: row 4 is empty"),
        (f"\n{EOS}", "\n" + EOS, "cant_decode: row 1 is empty"),
        ("10\n23\n46", None, "bad_content"),
        ("10\n23", None, "bad_xy_size"),
    ],
)
def test_decoding_with_and_without_an_end(text, end, result):
    grid, correct, info = toy().decode(text, "\n", key="toy_0", reply_end=end)
    assert info == result
    assert correct is (result == "ALL_CORRECT")
    assert (grid is None) == result.startswith("cant_decode")


def test_decoding_without_key_or_solution():
    ds = toy()
    assert ds.decode("12", "\n")[1:] == (None, "unknown")
    assert ds.decode("12", "\n", key="other_0")[1:] == (None, "sol_unknown")
    grid, correct, info = ds.remove_test_data().decode("12", "\n", key="toy_0.tp")
    assert (grid.tolist(), correct, info) == ([[1], [2]], None, "sol_unknown")
    assert ds.decode("1;2", ";")[0].tolist() == [[1], [2]]


# -- spans, lengths, limits


def test_reply_spans_by_hand():
    assert find_reply_spans("AI1O2$I3O4$", "O", "$") == [(4, 6), (9, 11)]
    assert find_reply_spans("AI1O2$I3O", "O", "$") == [(4, 6)]
    assert find_reply_spans("AI1", "O", "$") == []
    with pytest.raises(ValueError, match="cut in the middle of a reply"):
        find_reply_spans("AI1O2$I3O4", "O", "$")


def test_counting_tokens():
    assert ArcDataset.count_tokens(f"12\n{EOS}") == 4
    assert ArcDataset.count_tokens(f"12\n{EOS}", MERGING) == 3
    assert ArcDataset.max_new_tokens(**FORMAT) == 30 * 31 - 1 + 2 + 1
    ds = toy()
    # [[0, 1, 2], [3, 4, 5]]: 6 cells and a line end, or two as its transpose.
    bare = {"preprompt": "", "query_beg": "", "reply_beg": "", "reply_end": "", "lines_sep": "\n"}
    assert ds.get_length("toy_0", "query") == 6
    assert ds.get_length("toy_0", "query", **bare) == 8
    assert ds.get_length("toy_0", "query", max_of_transposed=True, **bare) == 9
    assert ds.sorted_by_len(len_name="query").keys == ["toy_1", "toy_0"]
    assert ds.sorted_by_len(len_name="query", reverse=True).keys == ["toy_0", "toy_1"]


def test_dropping_demonstrations():
    ds = toy()
    full = len(ds.fmt_task("toy_1", **FORMAT)["text"].replace(EOS, "$"))
    key, task = ds.get_task("toy_1", max_tokens=full, len_name="text", **FORMAT)
    assert key == task["key"] == "toy_1"
    key, task = ds.get_task("toy_1", max_tokens=full - 1, len_name="text", **FORMAT)
    assert key == task["key"] == "toy_1.ex0-1"
    assert ds.get_task("toy_1.ex2-1-0", max_tokens=full - 1, **FORMAT)[0] == "toy_1.ex2-1"
    two = ds.count_tokens(ds.fmt_task("toy_1.ex2-1.tp", **FORMAT)["text"])
    assert ds.get_task("toy_1.ex2-1.tp", max_tokens=two - 1, **FORMAT)[0] == "toy_1.ex2-1.tp.ex0"
    with pytest.raises(ValueError, match=r"toy_1.* tokens with one demonstration, expected at most 20"):
        ds.get_task("toy_1", max_tokens=20, **FORMAT)
    assert len(ds.as_list(quiet=True, **FORMAT)) == 2


@pytest.mark.parametrize(
    "tokenizer", [SINGLE, MERGING, build_tokenizer(bos=False)], ids=["single", "merging", "no bos"]
)
def test_ids_are_the_tokenizer_s_own(tokenizer, folder):
    ds = ArcDataset.load_from_local_json(folder, sizes=(2, 4), seed=1)
    encoder = SampleEncoder(tokenizer, **FORMAT)
    assert encoder.one_token_per_cell == (tokenizer is not MERGING)
    keys = ds.augment(3, tp="all", rt="all", perm=True, shfl_ex=True).keys
    assert encoder.encode(ds, []) == []
    for limit in (None, 270, 200):
        for reply in (True, False):
            for key, row in zip(keys, encoder.encode(ds, keys, limit, reply), strict=True):
                task = ds.fmt_task(row["key"], **FORMAT)
                text = task["text" if reply else "input"]
                assert row["input_ids"].dtype == row["reply_spans"].dtype == np.int32
                assert row["input_ids"].tolist() == tokenizer(text)["input_ids"]
                assert limit is None or len(row["input_ids"]) <= limit
                pieces = [
                    "".join(tokenizer.convert_ids_to_tokens(row["input_ids"][a:b])) for a, b in row["reply_spans"]
                ]
                expected = find_reply_spans(text, FORMAT["reply_beg"], FORMAT["reply_end"])
                assert pieces == [text[a:b] for a, b in expected]
                if limit is None:
                    assert row["key"] == key
                elif reply and tokenizer is not MERGING:
                    bos = len(tokenizer("")["input_ids"])
                    wanted = ds.get_task(key, max_tokens=limit - bos, len_name="text", tokenizer=tokenizer, **FORMAT)[0]
                    assert row["key"] == wanted
    with pytest.raises(ValueError, match="tokens with one demonstration, expected at most 60"):
        encoder.encode(ds, keys, 60)


def test_puzzles_that_cannot_fit_are_dropped_and_no_other(folder):
    ds = ArcDataset.load_from_local_json(folder, sizes=(3,))
    for tokenizer in (SINGLE, MERGING):
        encoder = SampleEncoder(tokenizer, **FORMAT)
        options = {"tp": "all", "rt": "all", "perm": tokenizer is SINGLE, "shfl_ex": True}
        samples = TrainingSamples(ds, encoder, 150, seed=5, epochs=3, **options)
        assert 0 < len(samples.dropped) < len(ds)
        for puzzle in ds.challenge:
            fits = []
            for turn in ("", ".tp"):
                for i in range(3):
                    fits.append(
                        len(tokenizer(ds.fmt_task(f"{puzzle}_0{turn}.ex{i}", **FORMAT)["text"])["input_ids"]) <= 150
                    )
            assert (puzzle in samples.dropped) == (not all(fits))
        rows = samples.__getitems__(list(range(len(samples))))
        assert np.array_equal(np.sort(samples.lengths()), np.sort([len(row["input_ids"]) for row in rows]))
        assert len(samples.lengths(rows=5)) == 5
        lost = [row["reply_spans"].shape[0] < 4 for row in rows]
        assert samples.shortened() == pytest.approx(np.mean(lost))
        assert samples.total_rows == 3 * len(samples)
        assert sum(1 for _ in samples) == len(samples)
        with pytest.raises(IndexError):
            samples[-1]


# -- views depend on (seed, epoch, index) alone


def make_samples(path):
    ds = ArcDataset.load_from_local_json(path, sizes=(3,))
    return TrainingSamples(
        ds, SampleEncoder(SINGLE, **FORMAT), 400, seed=9, epochs=2, tp="all", rt=True, perm=True, shfl_ex=True
    )


def rows_of(samples, rows):
    return [(samples[row]["key"], samples[row]["input_ids"].tolist()) for row in rows]


def test_rows_do_not_depend_on_order_or_process(folder):
    samples = make_samples(folder)
    rows = list(range(2 * len(samples)))
    expected = rows_of(samples, rows)
    shuffled = np.random.default_rng(0).permutation(len(rows)).tolist()
    batch = samples.__getitems__(shuffled)
    assert [expected[i][0] for i in shuffled] == [row["key"] for row in batch]
    assert rows_of(pickle.loads(pickle.dumps(samples)), rows) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        halves = pool.starmap(rows_of, [(samples, rows[::2]), (samples, rows[1::2])])
    assert halves == [expected[::2], expected[1::2]]
    assert rows_of(make_samples(folder), rows) == expected
    first, second = expected[: len(samples)], expected[len(samples) :]
    assert all(a[0] != b[0] for a, b in zip(first, second, strict=True)), "views are drawn anew in each epoch"


def test_options_of_views():
    ds = toy().change_keys(["toy_0"])
    assert len({ds.views(0, tp=1, rt=np.True_).key(epoch, 0) for epoch in range(200)}) == 8
    assert ds.views(0).key(5, 0) == "toy_0"
    for options in ({"tp": "both"}, {"rt": None}, {"rt": 4}):
        with pytest.raises(ValueError, match='expected "all", True or False'):
            ds.views(0, **options)
    for epoch, index in ((0, 1), (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            ds.views(0).key(epoch, index)


def test_draws_are_even():
    ds = toy().change_keys(["toy_0"])
    keys = ds.views(3, tp=True, rt=True, perm=True, shfl_ex=True).keys(np.arange(12_000), np.zeros(12_000, dtype=int))
    symmetries = [k.split(".perm")[0] for k in keys]
    counts = np.unique(symmetries, return_counts=True)[1]
    assert len(counts) == 8
    assert abs(counts - 1500).max() < 200
    colours = np.array([[int(c) for c in k.split(".perm")[1][:10]] for k in keys])
    for c in range(10):
        assert abs(np.bincount(colours[:, c], minlength=10) - 1200).max() < 170
    orders = np.unique([k.split(".ex")[1] for k in keys], return_counts=True)[1]
    assert len(orders) == 6
    assert abs(orders - 2000).max() < 220


def test_draws_are_the_same_on_every_machine():
    ds = toy().change_keys(["toy_0"])
    key = ds.views(42, tp=True, rt=True, perm=True, shfl_ex=True).key(1, 0)
    assert key == "toy_0.rt.rt.perm1725390864.ex1-0-2"


def test_numpy_s_global_generator_is_left_alone(folder):
    before = pickle.dumps(np.random.get_state())  # noqa: NPY002
    ds = ArcDataset.load_from_local_json(folder, sizes=(3,))
    ds.augment(1, tp=True, perm=True, shfl_ex=True)
    ds.augment(None, perm=True)
    ds.holdout(examples=2, tasks=1)
    ds.split(2, 0)
    ds.repeat(2, seed=1)
    make_samples(folder).lengths()
    assert pickle.dumps(np.random.get_state()) == before  # noqa: NPY002


# -- loading


def test_puzzles_are_spread_over_tasks_and_no_pair_is_used_twice(folder):
    ds = ArcDataset.load_from_local_json(folder, sizes=(2,), seed=3)
    assert len(ds) == 23 // 3 + 9 // 3 + 30 // 3
    assert ds.left_out == {"pairs that fill no puzzle": 2}
    for r in range(3):
        assert {ds.task_of(k) for k in ds.keys[3 * r : 3 * r + 3]} == {"task0", "task1", "task2"}
    assert all(k.endswith(f"-{i // 3:03d}_0") for i, k in enumerate(ds.keys[:9]))
    used = [(v["train"].first, len(v["train"])) for v in ds.challenge.values()]
    grids = [g for first, count in used for g in range(first, first + 2 * count + 2)]
    assert len(grids) == len(set(grids)) == 2 * 3 * len(ds)
    offsets = ds.store.offsets[grids]
    assert len(np.unique(offsets)) == len(offsets)
    assert ArcDataset.load_from_local_json(folder, n=5, sizes=(2,), seed=3).keys == ds.keys[:5] == ds.subset(5).keys
    assert ArcDataset.load_from_local_json(folder, sizes=(2,), seed=4).keys != ds.keys
    mixed = ArcDataset.load_from_local_json(folder, sizes=(2, 5))
    sizes = [len(p["train"]) for name, p in mixed.challenge.items() if name.startswith("task2")]
    assert set(sizes) == {2, 5}
    assert abs(sizes.count(2) - sizes.count(5)) <= 1


def test_what_is_read_is_what_is_in_the_files(folder):
    ds = ArcDataset.load_from_local_json(folder, sizes=(4,))
    for task in ("task0", "task1", "task2"):
        written = {json.dumps(pair) for pair in json.loads((folder / f"{task}.json").read_text())}
        for puzzle in (name for name in ds.challenge if ds.task_of(name) == task):
            value = ds.challenge[puzzle]
            pairs = [*value["train"], {**value["test"][0], "output": ds.solutions[puzzle][0]}]
            for pair in pairs:
                assert pair["input"].dtype == np.uint8
                assert not pair["input"].flags.writeable
                text = json.dumps({name: grid.tolist() for name, grid in pair.items()})
                assert text in written
                written.remove(text)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_quick_parser_agrees_with_json(separators, indent):
    pairs = random_pairs(40, 8, side=30)
    found = files.scan_pairs(json.dumps(pairs, separators=separators, indent=indent).encode() + b"\n")
    cells, heights, widths = found
    grids = [np.array(pair[name]) for pair in pairs for name in ("input", "output")]
    assert list(zip(heights.tolist(), widths.tolist(), strict=True)) == [grid.shape for grid in grids]
    assert np.array_equal(cells, np.concatenate([grid.ravel() for grid in grids]))


@given(place=st.integers(0, 400), byte=st.sampled_from(b'0123456789[]{},:" \nieopx-.\x00\xff'), kind=st.integers(0, 2))
@settings(max_examples=400, deadline=None)
def test_the_quick_parser_takes_nothing_that_json_would_read_differently(place, byte, kind):
    data = bytearray(json.dumps(random_pairs(3, 5, side=3), separators=(",", ":")).encode())
    place %= len(data)
    if kind == 0:
        data[place] = byte
    elif kind == 1:
        data.insert(place, byte)
    else:
        del data[place]
    found = files.scan_pairs(bytes(data))
    if found is None:
        return
    cells, heights, widths = found
    pairs = json.loads(data)
    grids = [pair[name] for pair in pairs for name in ("input", "output")]
    assert [(len(grid), len(grid[0])) for grid in grids] == list(zip(heights.tolist(), widths.tolist(), strict=True))
    assert cells.tolist() == [cell for grid in grids for row in grid for cell in row]
    assert all(len(row) == len(grid[0]) for grid in grids for row in grid)


def test_filter_of_grid_sizes(folder):
    ds = ArcDataset.load_from_local_json(folder, sizes=(2,), grid_sizes=(2, 5))
    sides = [s for v in ds.challenge.values() for pair in v["train"] for grid in pair.values() for s in grid.shape]
    assert 2 <= min(sides) <= max(sides) <= 5
    assert ds.left_out["pairs outside grid_sizes"] > 0
    assert "outside grid_sizes" in repr(ds)


def test_official_files_and_mixed_folders(tmp_path):
    official = {"train": PUZZLE["train"], "test": [{"input": GRID, "output": [[1]]}, {"input": [[7]], "output": [[2]]}]}
    (tmp_path / "a_b.c.json").write_text(json.dumps(official))
    (tmp_path / "open.json").write_text(json.dumps(PUZZLE))
    (tmp_path / "pairs.json").write_text(json.dumps(random_pairs(14, 1)))
    ds = ArcDataset.load_from_local_json(tmp_path, sizes=(6,))
    assert sorted(ds.keys) == ["a-b-c_0", "a-b-c_1", "open_0", "open_1", "pairs-000_0", "pairs-001_0"]
    assert [g.tolist() for g in ds.solutions["a-b-c"]] == [[[1]], [[2]]]
    assert "open" not in ds.solutions
    assert [p["output"].tolist() for p in ds.challenge["a-b-c"]["train"]] == [p["output"] for p in PUZZLE["train"]]
    assert ds.challenge["open"]["test"][0]["input"].tolist() == GRID
    pair = {"input": GRID, "output": GRID}
    (tmp_path / "big.json").write_text(json.dumps({"train": [pair, PUZZLE["train"][0]], "test": [pair]}))
    (tmp_path / "bigger.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    filtered = ArcDataset.load_from_local_json(tmp_path, sizes=(13,), grid_sizes=(1, 2))
    assert [len(filtered.challenge[p]["train"]) for p in ("a-b-c", "big")] == [3, 1], "the test is kept as it is"
    assert "bigger" not in filtered.challenge
    assert filtered.left_out["tasks without a puzzle"] == 2


def test_kaggle_files(tmp_path):
    challenges, solutions = tmp_path / "c.json", tmp_path / "s.json"
    challenges.write_text(json.dumps({"b": PUZZLE, "a": PUZZLE}))
    solutions.write_text(json.dumps({"a": SOLUTIONS, "b": SOLUTIONS, "c": []}))
    bare = ArcDataset.load_from_json(challenges)
    assert bare.keys == ["a_0", "a_1", "b_0", "b_1"]
    assert bare.solutions == {}
    ds = bare.load_solutions(solutions)
    assert [g.tolist() for g in ds.solutions["a"]] == SOLUTIONS
    assert ds.challenge["b"]["train"][2]["output"].tolist() == [[9, 0], [1, 2]]
    same = ArcDataset({"a": PUZZLE, "b": PUZZLE}, {"a": SOLUTIONS, "b": SOLUTIONS})
    assert same.content_hash() == ds.content_hash() != bare.content_hash()
    assert ArcDataset(ds.challenge, ds.solutions, ds.keys).content_hash() == ds.content_hash()
    assert ds.holdout(examples=1).seen.solutions.keys() <= {"a", "b"}


def test_rearc_and_mixing(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "metadata.json").write_text(json.dumps({"t1": {}, "t2": {}}))
    for i, name in enumerate(("t1", "t2")):
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(random_pairs(20, i)))
    ds = ArcDataset.load_from_rearc(tmp_path, n=3, sizes=[2, 3], seed=0, mix_datasets={"my_toy": toy()})
    assert len(ds) == 6 + 2
    assert {k.split("_")[0] for k in ds.keys} == {f"rearc-{t}{r:02x}" for t in ("t1", "t2") for r in range(3)} | {
        "my-toy-toy"
    }
    assert ds.solutions["my-toy-toy"][0].tolist() == SOLUTIONS[0]
    assert ds.task_of("rearc-t102_0") == "t1"
    plain = ArcDataset.load_from_rearc(tmp_path, n=2, sizes=[3], seed=0, shuffle=False)
    assert plain.keys == ["rearc-t100_0", "rearc-t200_0", "rearc-t101_0", "rearc-t201_0"]
    with pytest.raises(ValueError, match="enough for 5 rounds"):
        ArcDataset.load_from_rearc(tmp_path, n=6, sizes=[3], seed=0)


def test_neoneye_takes_the_highest_version(tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    for name, cell in (("p.json", 1), ("p_v2.json", 2), ("p_v10.json", 3), ("q.json", 4)):
        pair = {"input": [[cell]], "output": [[cell]]}
        (tmp_path / "data" / "x" / name).write_text(json.dumps({"train": [pair], "test": [pair], "source": "x"}))
    ds = ArcDataset.load_from_neoneye(tmp_path)
    assert ds.keys == ["p-v10_0", "q_0"]
    assert ds.solutions["p-v10"][0].tolist() == [[3]]


def test_cache_notices_changed_and_damaged_files(folder, tmp_path, monkeypatch):
    home = tmp_path / "cache"
    monkeypatch.setenv("ARC_LOADER_CACHE", str(home))
    monkeypatch.setattr(files, "CACHE_MIN_BYTES", 0)
    parsed = []
    parse = files.parse_task_file
    monkeypatch.setattr(files, "parse_task_file", lambda *a: parsed.append(a[1]) or parse(*a))

    def load():
        parsed.clear()
        return ArcDataset.load_from_local_json(folder, sizes=(3,)).content_hash(), len(parsed)

    first, count = load()
    assert count == 3
    assert not list(home.glob("*")), "files of this moment may still change"
    later = files.time.time_ns() + 10**10
    monkeypatch.setattr(files.time, "time_ns", lambda: later)
    assert load() == (first, 3)
    (cache,) = home.glob("*.npz")
    assert load() == (first, 0)
    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:700] + bytes([b[700] ^ 1]) + b[701:]):
        cache.write_bytes(damage(cache.read_bytes()))
        assert load() == (first, 3), "a damaged cache is parsed again"
        assert load() == (first, 0), "and written again"
    changed = (folder / "task1.json").read_text()
    (folder / "task1.json").write_text(changed.replace("1", "2", 1))
    assert load()[1] == 3
    (folder / "task1.json").write_text(changed)
    assert load()[0] == first
    home.chmod(0o500)
    monkeypatch.setenv("ARC_LOADER_CACHE", str(folder / "task0.json"))  # not a folder: cannot be written
    assert load() == (first, 3)


# -- splits


def test_holdout_is_disjoint_and_stable(folder):
    whole = ArcDataset.load_from_local_json(folder, sizes=(2,))
    split = whole.holdout(examples=4, tasks=1, seed=7)
    keys = [set(part.keys) for part in split]
    assert keys[0] | keys[1] | keys[2] == set(whole.keys)
    assert sum(map(len, keys)) == len(whole)
    tasks = [{part.task_of(k) for k in part.keys} for part in split]
    assert tasks[0].isdisjoint(tasks[2])
    assert tasks[1] == tasks[0], "both tasks that stay give examples"
    assert len(tasks[2]) == 1
    assert len(split.seen) == 4
    assert [sum(split.seen.task_of(k) == t for k in split.seen.keys) for t in sorted(tasks[1])] == [2, 2]
    assert [k for k in whole.keys if k in keys[0]] == split.train.keys
    for other in (
        ArcDataset.load_from_local_json(folder, n=7, sizes=(2,)),
        ArcDataset.load_from_local_json(folder, sizes=(3, 4), seed=1),
        whole.change_keys(whole.keys[::-1]),
    ):
        again = other.holdout(examples=0, tasks=1, seed=7)
        assert {other.task_of(k) for k in again.unseen.keys} == tasks[2]
    augmented = whole.augment(0, tp="all").holdout(examples=4, tasks=1, seed=7)
    assert set(augmented.seen.challenge) == set(split.seen.challenge)
    assert {k.split("_")[0] for k in augmented.train.keys}.isdisjoint(split.seen.challenge)


def test_holdout_asks_for_what_there_is(folder):
    ds = ArcDataset.load_from_local_json(folder, sizes=(2,))
    with pytest.raises(ValueError, match="maximum of 2"):
        ds.holdout(tasks=3)
    with pytest.raises(ValueError, match="maximum of 17"):
        ds.holdout(examples=18)
    assert len(ds.holdout(examples=17).train) == 3
    with pytest.raises(ValueError, match="maximum of 0"):
        toy().holdout(examples=1)
    with pytest.raises(ValueError, match="maximum of 20"):
        ds.subset(21)


def test_append_keeps_keys_tasks_and_grids():
    names = dict.fromkeys(("b", "a"), PUZZLE)
    one, two = ArcDataset(names, is_orig=True), ArcDataset({"c": PUZZLE}, keys=["c_0.tp", "c_0"])
    both = one.append(two, ArcDataset({"d": PUZZLE}))
    assert both.keys == [*one.keys, "c_0.tp", "c_0", *(key.replace("a", "d") for key in one.keys if key[0] == "a")]
    assert both.select_puzzles(names).content_hash() == one.content_hash() and both.task_of("c_0") == "c"
    assert both["c_0.tp"]["train"][0][1].tolist() == two["c_0.tp"]["train"][0][1].tolist() == [[3]]
    assert len({id(window.store) for part in both.challenge.values() for window in part.values()}) == 1
    with pytest.raises(ValueError, match="puzzle 'a' is there already"):
        one.append(two, ArcDataset({"a": PUZZLE}))


def test_split_repeat_and_groups():
    challenge = {name: {**PUZZLE, "train": PUZZLE["train"][: i + 1]} for i, name in enumerate("abc")}
    ds = ArcDataset(challenge, dict.fromkeys("abc", SOLUTIONS), is_orig=True)
    parts = ds.split(3, "len", len_name="input")
    assert [list(part.challenge) for part in parts] == [["a"], ["b"], ["c"]]
    halves = ds.split(2, 5)
    assert sorted(k for part in halves for k in part.keys) == ds.keys
    assert halves[0].solutions
    with pytest.raises(ValueError, match="maximum of 3"):
        ds.split(4, 5)
    with pytest.raises(ValueError, match="seed alone"):
        ds.split(2, 5, len_name="input")
    assert ds.repeat(2).keys == ds.keys * 2
    assert sorted(ds.repeat(2, seed=1).keys) == sorted(ds.keys * 2)
    groups = toy().change_keys(["toy_1", "toy_0.tp", "toy_1.rt"]).grouped_keys()
    assert groups == {"toy": [["toy_0.tp"], ["toy_1", "toy_1.rt"]]}
    assert toy().remove_test_data().grouped_keys() == {"toy": [["toy"]]}
    with pytest.raises(ValueError, match="as it was loaded"):
        ds.change_keys(ds.keys).split(2, 1)
    moved = toy().move_test_to_train()
    assert moved.keys == ["toy"]
    assert [pair["output"].tolist() for pair in moved.challenge["toy"]["train"][3:]] == SOLUTIONS


def test_submissions():
    ds = toy()
    results = {
        "toy": [[{"output": np.array([[5]])}, {"output": np.array(SOLUTIONS[0])}, {"output": np.array([[1]])}], []]
    }
    submission = ds.get_submission(results)
    assert submission == {
        "toy": [{"attempt_1": [[5]], "attempt_2": SOLUTIONS[0]}, {"attempt_1": [[0]], "attempt_2": [[0]]}]
    }
    assert ds.validate_submission(submission) == 0.5
    json.dumps(submission)
    submission["toy"][1]["attempt_1"] = [[6, 6], [6]]  # ragged: wrong, no error
    assert ds.validate_submission(submission) == 0.5
    submission["toy"][1]["attempt_2"] = [[6]]
    assert ds.validate_submission(submission) == 1.0
    with pytest.raises(ValueError, match="attempt_1 and attempt_2 of toy, test 1"):
        ds.validate_submission({"toy": submission["toy"][:1]})
    with pytest.raises(ValueError, match="results of nope"):
        ds.get_submission({"nope": [[]]})


def test_indexing_and_repr():
    ds = toy()
    shown = ds[0]
    assert shown["key"] == ds[-2]["key"] == "toy_0"
    assert shown["test"].tolist() == GRID
    assert shown["solution"].tolist() == SOLUTIONS[0]
    with pytest.raises(IndexError):
        ds[2]
    assert len(list(ds)) == 2
    assert repr(ds) == (
        "ArcDataset(2 keys of 1 puzzles of 1 tasks, 1 with solutions; 3 demonstrations; grids 1x1 to 3x3)"
    )
    assert repr(ds.change_keys([])) == "ArcDataset(0 keys of 0 puzzles of 0 tasks, 0 with solutions)"


# -- the real data, where it is


@pytest.mark.skipif(not COURSE.is_dir(), reason="the course dataset is not here")
def test_the_course_dataset():
    ds = ArcDataset.load_from_local_json(COURSE)
    assert len(ds) == len(ds.challenge) == 27_389
    assert ds.left_out == {"pairs that fill no puzzle": 192_628 - 7 * 27_389}
    spans = np.array([(v["train"].first, v["test"].first) for v in ds.challenge.values()])
    grids = (spans[:, :1] + np.arange(14)).ravel()
    assert (spans[:, 1] - spans[:, 0] == 12).all()
    assert len(np.unique(ds.store.offsets[grids])) == len(grids) == 14 * 27_389, "no example is used twice"
    assert len({ds.task_of(k) for k in ds.keys[:240]}) == 240
    with pytest.raises(ValueError, match="maximum is 27,389"):
        ArcDataset.load_from_local_json(COURSE, n=27_390)
    split = ds.holdout(examples=100, tasks=10)
    assert [len(part) for part in split][1] == 100
    encoder = SampleEncoder(SINGLE, **FORMAT)
    samples = TrainingSamples(split.train, encoder, 1536, seed=42, tp="all", rt="all", perm=True, shfl_ex=True)
    assert samples.dropped == []
    assert len(samples) == 8 * len(split.train)
    rows = np.random.default_rng(0).integers(0, len(samples), 200)
    for row in samples.__getitems__(rows.tolist()):
        assert row["input_ids"].tolist() == SINGLE(ds.fmt_task(row["key"], **FORMAT)["text"])["input_ids"]


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="ARC-AGI-1 is not here")
def test_the_official_files():
    ds = ArcDataset.load_from_json(OFFICIAL / "arc-agi_training_challenges.json")
    ds = ds.load_solutions(OFFICIAL / "arc-agi_training_solutions.json")
    assert len(ds.challenge) == 400
    raw = json.loads((OFFICIAL / "arc-agi_training_challenges.json").read_text())
    for puzzle in ds.challenge:
        read = ds.challenge[puzzle]
        for part in ("train", "test"):
            assert [{n: g.tolist() for n, g in pair.items()} for pair in read[part]] == raw[puzzle][part]
    for key in ds.augment(1, tp=True, rt=True, perm=True, shfl_ex=True).keys:
        assert ds.decode(ds.fmt_task(key, **FORMAT)["reply"], "\n", key=key, reply_end=FORMAT["reply_end"])[1] is True
    answers = {p: [[{"output": grid}] for grid in grids] for p, grids in ds.solutions.items()}
    assert ds.validate_submission(ds.get_submission(answers)) == pytest.approx(400)
