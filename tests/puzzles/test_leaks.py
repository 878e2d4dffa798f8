"""`find_leaks` against brute force over every symmetry, map of colours and order, and on sets whose leaks are known."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc.puzzles import fingerprints, leaks
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.fingerprints import pair_form, puzzle_fingerprint
from arc.puzzles.leaks import Leaks, find_leaks
from tests.helpers import SHARED

COURSE = SHARED / "data" / "course_dataset"

PUZZLE = {
    "train": [
        {"input": [[1, 2]], "output": [[3]]},
        {"input": [[4], [5]], "output": [[6, 7]]},
        {"input": [[8]], "output": [[9, 0], [1, 2]]},
    ],
    "test": [{"input": [[0, 1, 2], [3, 4, 5]]}, {"input": [[7]]}],
}
SOLUTIONS = [[[1, 0], [2, 3], [4, 5]], [[6]]]
STEPS = ["", ".tp", ".rt", ".tp.rt", ".rt.rt", ".tp.rt.rt", ".rt.rt.rt", ".tp.rt.rt.rt"]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("ARC_LOADER_CACHE", "off")


def arrays(*grids):
    return tuple(None if grid is None else np.array(grid, dtype=np.uint8) for grid in grids)


def puzzle_of(pairs, tests=1):
    """A puzzle whose last pairs are its tests; outputs None: no solutions."""
    pairs = [{"input": a, "output": b} if b is not None else {"input": a} for a, b in pairs]
    pairs = [{name: np.asarray(grid).tolist() for name, grid in pair.items()} for pair in pairs]
    return {"train": pairs[: len(pairs) - tests], "test": pairs[len(pairs) - tests :]}


def fingerprint(pairs, tests=1):
    return ArcDataset({"a": puzzle_of(pairs, tests)}).fingerprint("a")


def random_pairs(rng, count, side=6, colours=10):
    shapes = rng.integers(1, side + 1, (count, 2, 2))
    return [tuple(rng.integers(0, colours, shape).astype(np.uint8) for shape in pair) for pair in shapes]


def dressed(pairs, rng, order=True):
    """The pairs under one random symmetry and one permutation of colours, in another order."""
    steps = [step for step in str(rng.choice(STEPS)).split(".") if step]
    steps.insert(rng.integers(len(steps) + 1), "perm" + "".join(map(str, rng.permutation(10))))
    turned = [tuple(ArcDataset.transform_array(grid, steps) for grid in pair) for pair in pairs]
    return [turned[i] for i in rng.permutation(len(turned))] if order else turned


# -- fingerprints by hand


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        # one pair: turned, coloured, both, and neither
        ([([[1, 2, 2]], [[3]])], [([[1, 2, 2]], [[3]])], True),
        ([([[1, 2, 2]], [[3]])], [([[4], [4], [0]], [[7]])], True),
        ([([[1, 2, 2]], [[3]])], [([[1, 1, 2]], [[3]])], True),  # one cell is another, yet the puzzle is the same
        ([([[1, 2, 2]], [[3]])], [([[1, 2, 2]], [[2]])], False),
        ([([[1, 2, 2]], [[3]])], [([[2, 1, 2]], [[3]])], False),
        ([([[1, 2]], [[1, 2]])], [([[1], [2]], [[2], [1]])], False),  # each grid alone would be turned into the other
        ([([[1]], [[2, 2]])], [([[2, 2]], [[1]])], False),  # input and output do not change places
        ([([[1, 1], [1, 1]], [[1]])], [([[1, 1, 1, 1]], [[1]])], False),
        # colours are one permutation for all pairs
        ([([[1]], [[2]]), ([[2]], [[3]])], [([[5]], [[4]]), ([[7]], [[5]])], True),  # 1 to 2 to 3, then 7 to 5 to 4
        ([([[1]], [[2]]), ([[2]], [[3]])], [([[1]], [[2]]), ([[3]], [[4]])], False),
        ([([[1]], [[2]]), ([[2]], [[3]])], [([[1]], [[2]]), ([[3]], [[2]])], False),
        ([([[1]], [[2]]), ([[2]], [[1]])], [([[1]], [[2]]), ([[1]], [[2]])], False),
        # so is the symmetry
        ([([[1, 2]], [[1]]), ([[1, 2]], [[1]])], [([[1], [2]], [[1]]), ([[1], [2]], [[1]])], True),
        ([([[1, 2]], [[1]]), ([[1, 2]], [[1]])], [([[1, 2]], [[1]]), ([[1], [2]], [[1]])], False),
        # a pair counts as often as it is there
        ([([[1]], [[2]])] * 2, [([[1]], [[2]])] * 3, False),
        ([([[1]], [[1]])] * 2 + [([[2]], [[2]])], [([[1]], [[1]])] + [([[2]], [[2]])] * 2, True),
        ([([[1]], [[1]])] * 2 + [([[2]], [[2]])] * 2, [([[1]], [[1]])] * 3 + [([[2]], [[2]])], False),
        # an input alone is no pair
        ([([[1]], [[2]]), ([[3]], None)], [([[8]], [[5]]), ([[0]], None)], True),
        ([([[1]], [[2]]), ([[3]], None)], [([[1]], [[2]]), ([[1]], None)], False),
        ([([[1]], [[2]]), ([[3]], None)], [([[1]], [[2]]), ([[3]], [[3]])], False),
    ],
)
def test_equality_by_hand(one, other, equal):
    one, other = ([arrays(*pair) for pair in pairs] for pairs in (one, other))
    assert (puzzle_fingerprint(one) == puzzle_fingerprint(other)) == equal
    if len(one) == len(other) == 1:
        assert (pair_form(*one[0]) == pair_form(*other[0])) == equal


def test_fingerprints_stay_what_they_are():
    # They may be kept in files: of ([[1, 2]] to [[3]]) the patterns are 1 pair, sides 1 2 1 1, cells 0 1 2.
    form = (1).to_bytes(8, "big") + bytes([1, 2, 1, 1, 0, 1, 2]) + bytes([0, 1, 2])
    assert fingerprint([([[1, 2]], [[3]])], tests=0) == fingerprints.hashlib.sha256(form).hexdigest()


def test_any_view_has_its_puzzles_fingerprint():
    ds = ArcDataset({"a": PUZZLE, "b": PUZZLE | {"test": PUZZLE["test"][:1]}}, {"a": SOLUTIONS}, is_orig=True)
    expected = ds.fingerprint("a")
    views = ds.select_puzzles(["a"]).augment(seed=0, n=2, tp="all", rt="all", perm=True, shfl_ex=True)
    assert len(views.keys) == 32
    assert {view.fingerprint(key) for view in (views, ds) for key in views.keys} == {expected}
    assert ds.fingerprint("a_1.ex2") == expected  # the whole puzzle, whatever the view picks
    assert ds.fingerprint("a_0", solutions=False) != expected
    assert ds.fingerprint("b") == ds.fingerprint("b_0", solutions=False)
    assert len({ds.fingerprint(key) for key in ds.keys}) == 2
    for key in ("c", "a_2", "a_0.flip", "a_0.ex7"):
        with pytest.raises(ValueError, match="key"):
            ds.fingerprint(key)


def test_which_pair_is_the_test_does_not_matter():
    pairs = random_pairs(np.random.default_rng(0), 4)
    assert len({fingerprint(pairs[i:] + pairs[:i], tests) for i in range(4) for tests in (0, 1, 2)}) == 1
    bare = [fingerprint([*pairs[i + 1 :], *pairs[:i], (pairs[i][0], None)]) for i in range(4)]
    assert len(set(bare)) == 4  # which of them is without a solution does


def test_loaded_from_files(tmp_path):
    moved = {
        "train": [{name: np.rot90(grid).tolist() for name, grid in pair.items()} for pair in PUZZLE["train"][::-1]],
        "test": [{"input": np.rot90(query["input"]).tolist()} for query in PUZZLE["test"]],
    }
    (tmp_path / "challenges.json").write_text(json.dumps({"a": PUZZLE, "b": moved}))
    solutions = {"a": SOLUTIONS, "b": [np.rot90(grid).tolist() for grid in SOLUTIONS]}
    (tmp_path / "solutions.json").write_text(json.dumps(solutions))
    bare = ArcDataset.load_from_json(tmp_path / "challenges.json")
    ds = bare.load_solutions(tmp_path / "solutions.json")
    assert ds.fingerprint("a_0") == ds.fingerprint("b_1") != bare.fingerprint("a_0")
    assert bare.fingerprint("a_0") == bare.fingerprint("b_1") == ds.fingerprint("a", solutions=False)


# -- fingerprints by property

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 6), st.sampled_from([1, 2, 3, 10]), st.sampled_from([1, 2, 6, 30]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_symmetry_colours_and_order_keep_it(seed, count, colours, side, solved):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, count, side, colours)
    pairs += [pairs[i] for i in rng.integers(0, count, rng.integers(3))]
    tests = 0 if len(pairs) == 1 else int(rng.integers(len(pairs)))
    if not solved:
        pairs = pairs[: len(pairs) - tests] + [(query, None) for query, _ in pairs[len(pairs) - tests :]]
    expected = fingerprint(pairs, tests)
    known, last = pairs[: len(pairs) - tests], pairs[len(pairs) - tests :]
    if solved:
        assert fingerprint(dressed(pairs, rng), int(rng.integers(len(pairs)))) == expected
    both = dressed(known + last, rng, order=False)  # demonstrations and tests, each in an order of their own
    known, last = both[: len(known)], both[len(known) :]
    moved = [known[i] for i in rng.permutation(len(known))] + [last[i] for i in rng.permutation(len(last))]
    assert fingerprint(moved, tests) == expected
    # A view's grids, taken for a puzzle of their own.
    ds = ArcDataset({"a": puzzle_of(pairs, tests)}, is_orig=True)
    view = ds.augment(seed, tp=True, rt=True, perm=True, shfl_ex=True).keys[0].split(".", 1)[1]
    seen = [ds[f"{key}.{view}"] for key in ds.keys]
    rebuilt = [*seen[0]["train"], *((one["test"], one["solution"]) for one in seen if one["test"] is not None)]
    assert fingerprint(rebuilt, tests) == expected


@given(SEEDS, st.integers(1, 5), st.sampled_from([2, 6, 30]))
@settings(max_examples=100, deadline=None)
def test_changing_one_cell_changes_it(seed, count, side):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, count, side, colours=9)
    cells = np.concatenate([grid.ravel() for pair in pairs for grid in pair])
    changed = [tuple(grid.copy() for grid in pair) for pair in pairs]
    grid = changed[rng.integers(count)][rng.integers(2)]
    place = tuple(rng.integers(side) for side in grid.shape)
    others = cells[cells != grid[place]]
    # One colour more than before, or one fewer: then no permutation makes up for it.
    grid[place] = 9 if len(others) < len(cells) - 1 else others[0]
    assert puzzle_fingerprint(pairs) != puzzle_fingerprint(changed)


def equal_by_force(one, other):
    """Whether any symmetry, injective map of colours and order of the pairs turns one puzzle into the other."""
    if len(one) != len(other):
        return False

    def used(pairs):
        return sorted({int(c) for pair in pairs for grid in pair if grid is not None for c in grid.ravel()})

    def plain(pair):
        return tuple(None if grid is None else grid.tolist() for grid in pair)

    wanted = [plain(pair) for pair in other]
    for turns, transposed in itertools.product(range(4), (False, True)):
        for image in itertools.permutations(used(other), len(used(one))):
            lookup = np.zeros(10, dtype=np.uint8)
            lookup[used(one)] = image
            turned = []
            for pair in one:
                grids = [None if grid is None else np.rot90(lookup[grid], turns) for grid in pair]
                turned.append(plain(g if g is None or not transposed else g.T for g in grids))
            if any(list(order) == wanted for order in itertools.permutations(turned)):
                return True
    return False


@given(SEEDS, st.integers(1, 4), st.integers(2, 4), st.sampled_from([(1, 1), (1, 2), (2, 2)]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_equal_fingerprints_are_what_brute_force_finds(seed, count, colours, shape, unsolved):
    # Few cells of few colours: random puzzles are often equal, and nearly equal ones are in between.
    rng = np.random.default_rng(seed)
    one, other = (
        [tuple(rng.integers(0, colours, shape[:: rng.choice((1, -1))]) for _ in range(2)) for _ in range(count)]
        for _ in range(2)
    )
    if rng.random() < 0.5:
        other = dressed(one, rng)
        if rng.random() < 0.5:
            query = other[-1][0].copy()
            query[0, 0] = other[0][1][0, 0]
            other[-1] = (query, other[-1][1])
    if unsolved:
        one[-1], other[-1] = (one[-1][0], None), (other[-1][0], None)
    one, other = ([arrays(*pair) for pair in pairs] for pairs in (one, other))
    assert (puzzle_fingerprint(one) == puzzle_fingerprint(other)) == equal_by_force(one, other)
    assert (pair_form(*one[0]) == pair_form(*other[0])) == equal_by_force(one[:1], other[:1])


# -- colours that are hard to tell apart


def edges(*cycles):
    """Both directions of the edges of cycles."""
    return [
        arc for cycle in cycles for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True) for arc in ((a, b), (b, a))
    ]


SPOKES = [arc for i in range(5) for arc in ((i, i + 5), (i + 5, i))]
FIVE, OTHER_FIVE, STAR = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [5, 7, 9, 6, 8]
HARD = {
    "ten of one colour": [(i,) for i in range(10)],
    "five of two": [(2 * i, 2 * i + 1) for i in range(5)],
    "all of two": list(itertools.permutations(range(10), 2)),
    "all of three": list(itertools.permutations(range(10), 3)),
    "all turns of ten": [tuple((i + j) % 10 for j in range(10)) for i in range(10)],
    "Petersen graph": edges(FIVE, STAR) + SPOKES,
    "prism": edges(FIVE, OTHER_FIVE) + SPOKES,
    "two cycles of 5": edges(FIVE, OTHER_FIVE),
    "cycle of 10": edges(FIVE + OTHER_FIVE),
    "cycles of 3 and 7": edges([0, 1, 2], [3, 4, 5, 6, 7, 8, 9]),
    "cycles of 3, 3 and 4": edges([0, 1, 2], [3, 4, 5], [6, 7, 8, 9]),
}


def test_colours_alike_cost_little(monkeypatch):
    namings, rename = [], fingerprints._renamed
    monkeypatch.setattr(fingerprints, "_renamed", lambda *a: namings.append(1) or rename(*a))
    rng, found = np.random.default_rng(0), {}
    for name, rows in HARD.items():
        # Symmetric grids, so that all 8 images are looked at alike: (a, b, c) are rings of a square.
        pairs = []
        for colours in rows:
            square = np.full((2 * len(colours) + 1,) * 2, colours[0], dtype=np.uint8)
            for depth, colour in enumerate(colours[1:], 1):
                square[depth:-depth, depth:-depth] = colour
            pairs.append((square, square[:1, :1]))
        namings.clear()
        found[name] = puzzle_fingerprint(pairs)
        assert 1 <= len(namings) <= 10, name
        for _ in range(2):
            assert puzzle_fingerprint(dressed(pairs, rng)) == found[name], name
        # One more pair tells some of them apart.
        assert puzzle_fingerprint([*pairs, pairs[0]]) == puzzle_fingerprint(dressed([*pairs, pairs[0]], rng)), name
    assert len(set(found.values())) == len(HARD)  # such as the prism and Petersen's graph, where degrees do not help


def partitions(total, largest=10):
    """All ways to write a number as a sum of positive numbers."""
    if not total:
        return [[]]
    return [[k, *rest] for k in range(1, min(total, largest) + 1) for rest in partitions(total - k, k)]


def test_permutations_differ_by_the_lengths_of_their_cycles():
    # Each colour stands once in an input and once in an output: refinement alone tells none apart.
    rng, found = np.random.default_rng(0), set()
    for lengths in partitions(10):
        ends = np.cumsum(lengths)
        rows = [(c, c + 1 if c + 1 not in ends else c + 1 - lengths[list(ends).index(c + 1)]) for c in range(10)]
        pairs = [arrays([[a]], [[b, b]]) for a, b in rows]
        found.add(expected := puzzle_fingerprint(pairs))
        assert all(puzzle_fingerprint(dressed(pairs, rng)) == expected for _ in range(8)), lengths
    assert len(found) == 42


@given(SEEDS, st.integers(2, 4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_regular_structures(seed, degree, directed):
    # Every colour in as many pairs as any other: only the search tells them apart.
    rng = np.random.default_rng(seed)
    rows = [(a, b) for _ in range(degree) for a, b in enumerate(rng.permutation(10).tolist())]
    pairs = [arrays([[a]], [[b]]) for a, b in rows] + ([] if directed else [arrays([[b]], [[a]]) for a, b in rows])
    assert puzzle_fingerprint(pairs) == puzzle_fingerprint(dressed(pairs, rng))


# -- leaks


def dataset(**puzzles):
    """A dataset of (pairs, how many of them are tests)."""
    return ArcDataset({name: puzzle_of(*pairs) for name, pairs in puzzles.items()}, is_orig=True)


@pytest.fixture
def parts():
    """Random pairs of three puzzles that have nothing in common, and a generator."""
    rng = np.random.default_rng(1)
    return random_pairs(rng, 4), random_pairs(rng, 4), random_pairs(rng, 4), rng


def test_leaked_and_not(parts):
    a, b, c, rng = parts
    evaluation = dataset(a=(a,), b=(b,))
    assert find_leaks(evaluation, dataset(c=(c,))) == Leaks({}, {})
    copies = {"copy": (dressed(a, rng),), "other": (c,), "again": (dressed(a, rng), 2), "moved": (dressed(a, rng), 0)}
    training = dataset(**copies)
    expected = ("again", "copy", "moved")  # the order of the puzzles, which is that of the sorted keys
    assert find_leaks(evaluation, training) == Leaks({"a": expected}, {"a_0": expected})
    assert find_leaks(training, evaluation).puzzles == dict.fromkeys(expected, ("a",))
    views = evaluation.augment(0, tp="all", perm=True, shfl_ex=True)  # views are no other puzzles
    assert find_leaks(views, training.augment(1, rt=True)) == Leaks({"a": expected}, {"a_0": expected})
    assert find_leaks(evaluation.select_puzzles(["b"]), training) == Leaks({}, {})
    assert find_leaks(evaluation, evaluation) == Leaks({"a": ("a",), "b": ("b",)}, {"a_0": ("a",), "b_0": ("b",)})


def test_a_test_pair_among_the_pairs_of_others(parts):
    a, b, c, rng = parts
    evaluation = dataset(a=(a,), b=(b, 2))
    one = dressed(a[3:], rng)  # each pair turned and coloured in its own way
    training = dataset(shown=([*c, *one, *dressed(a[3:], rng), c[0]],), asked=([*c, *dressed(b[2:3], rng)],))
    assert find_leaks(evaluation, training) == Leaks({}, {"a_0": ("shown",), "b_0": ("asked",)})
    assert find_leaks(evaluation.change_keys(["a", "b_1.tp"]), training) == Leaks({}, {})  # tests that keys name
    assert find_leaks(evaluation, dataset(shown=([*a[:3], *c],))) == Leaks({}, {})  # demonstrations are no leak
    alone = training.move_test_to_train()
    assert find_leaks(evaluation, alone).tests == {"a_0": ("shown",), "b_0": ("asked",)}
    assert find_leaks(alone, evaluation).tests == {}


def test_without_solutions(parts):
    a, b, c, rng = parts
    copy, other = dressed(a, rng, order=False), [*dressed(a, rng, order=False)[:3], c[0]]
    asked = [*b, (dressed(a[3:], rng)[0][0], c[0][1])]  # the same input, another output
    puzzles = {"copy": copy, "other": other, "asked": asked, "far": c}
    solved = dataset(a=(a,)), dataset(**{name: (pairs,) for name, pairs in puzzles.items()})
    unsolved = {name: ([*pairs[:-1], (pairs[-1][0], None)],) for name, pairs in (puzzles | {"a": a}).items()}
    bare = dataset(a=unsolved.pop("a")), dataset(**unsolved)
    assert find_leaks(solved[0], solved[1]) == Leaks({"a": ("copy",)}, {"a_0": ("copy",)})
    weaker = Leaks({"a": ("copy",)}, {"a_0": ("asked", "copy")})
    assert find_leaks(bare[0], solved[1]) == find_leaks(solved[0], bare[1]) == find_leaks(bare[0], bare[1]) == weaker
    # Among demonstrations the test is found by its input; which of them it was, nobody knows.
    assert find_leaks(bare[0], solved[1].move_test_to_train()) == Leaks({}, {"a_0": ("asked", "copy")})


def test_parts_of_one_folder(tmp_path):
    rng = np.random.default_rng(2)
    for task in range(3):
        pairs = random_pairs(rng, 12, side=4)
        pairs += [pair for old in pairs[:8] for pair in dressed([old], rng)]
        (tmp_path / f"task{task}.json").write_text(
            json.dumps([{"input": a.tolist(), "output": b.tolist()} for a, b in pairs])
        )
    split = ArcDataset.load_from_local_json(tmp_path, sizes=(1,)).holdout(examples=12, tasks=1)
    assert split.train.store is split.seen.store
    leaks = find_leaks(split.seen, split.train)
    assert leaks == leaks_by_force(split.seen, split.train)
    assert leaks.tests and not leaks.puzzles
    assert all(name.split("-")[0] == key.split("-")[0] for key, found in leaks.tests.items() for name in found)
    assert find_leaks(split.unseen, split.train) == leaks_by_force(split.unseen, split.train) == Leaks({}, {})


def leaks_by_force(evaluation, training):
    """The forms of everything, compared one by one."""

    def known(ds, name):
        return name in ds.solutions or not len(ds.challenge[name]["test"])

    def pairs(ds, name):
        puzzle = ds.challenge[name]
        outputs = ds.solutions.get(name) or [None] * len(puzzle["test"])
        shown = [(pair["input"], pair["output"]) for pair in puzzle["train"]]
        return shown + [(query["input"], output) for query, output in zip(puzzle["test"], outputs, strict=True)]

    def same(one, other):
        both = one[1] is not None and other[1] is not None
        return pair_form(one[0], one[1] if both else None) == pair_form(other[0], other[1] if both else None)

    puzzles, tests = {}, {}
    for name, puzzle in evaluation.challenge.items():
        for other in training.challenge:
            both = known(evaluation, name) and known(training, other)
            if evaluation.fingerprint(name, both) == training.fingerprint(other, both):
                puzzles[name] = (*puzzles.get(name, ()), other)
            for number, test in enumerate(pairs(evaluation, name)[len(puzzle["train"]) :]):
                if f"{name}_{number}" in evaluation.keys and any(same(test, pair) for pair in pairs(training, other)):
                    tests[f"{name}_{number}"] = (*tests.get(f"{name}_{number}", ()), other)
    return Leaks(puzzles, tests)


@given(SEEDS, st.sampled_from([2, 10]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 7, 1_000_000]))
@settings(max_examples=60, deadline=None)
def test_signatures_lose_nothing(seed, colours, side, cells):
    rng = np.random.default_rng(seed)

    def random_set(prefix, stock):
        puzzles = {}
        for number in range(rng.integers(1, 7)):
            count, tests = int(rng.integers(1, 4)), int(rng.integers(3))
            pairs = [stock[i] for i in rng.integers(len(stock), size=count + tests)]
            pairs = dressed(pairs, rng, order=False)
            if rng.random() < 0.4:
                pairs = pairs[:count] + [(query, None) for query, _ in pairs[count:]]
            puzzles[f"{prefix}{number}"] = puzzle_of(pairs, tests)
        return ArcDataset(puzzles, is_orig=True)

    stock = random_pairs(rng, 4, side, colours)
    evaluation, training = random_set("e", stock), random_set("t", stock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaks, "CHUNK_CELLS", cells)
        assert find_leaks(evaluation, training) == leaks_by_force(evaluation, training)


@pytest.mark.skipif(not COURSE.is_dir(), reason="the course dataset is not here")
def test_course_dataset():
    split = ArcDataset.load_from_local_json(COURSE).holdout(examples=64)
    leaks = find_leaks(split.seen, split.train)
    assert not leaks.puzzles and leaks.tests
    for key, found in leaks.tests.items():
        view = split.seen[key]
        for name in found:
            other = split.train[f"{name}_0"]
            forms = {pair_form(*pair) for pair in [*other["train"], (other["test"], other["solution"])]}
            assert pair_form(view["test"], view["solution"]) in forms
