"""Rules put together at random: that programs do what they promise, and operations what they say."""

import itertools
import json

import numpy as np
import pytest

from arc.generation import objects, operations, programs
from arc.generation.objects import find_objects, inside_of, neighbours_of
from arc.generation.operations import OPERATIONS
from arc.generation.programs import LENGTHS, draw_rule
from arc.generation.rules import Unfit, draw_pairs
from arc.generation.scenes import SCENES


def grid(text):
    """A grid of digits, "." black, a word for each row."""
    return np.array([[0 if cell == "." else int(cell) for cell in row] for row in text.split()])


class Choosing:
    """Stands in for the random numbers of a rule's parameters: every choice is given, in order."""

    def __init__(self, monkeypatch, *choices):
        left = list(choices)

        def choose(*_, **__):
            return left.pop(0)

        for module in (objects, *operations.FILES):
            if hasattr(module, "pick"):
                monkeypatch.setattr(module, "pick", lambda _, among: choose())
        self.integers = self.random = choose
        self.permutation = lambda n: np.arange(n)
        self.left = left


def drawn(count, max_side, seed=0):
    rng = np.random.default_rng(seed)
    return [draw_rule(rng, max_side) for _ in range(count)], rng


@pytest.mark.parametrize("max_side", [3, 6, 10])
def test_programs_change_every_input_stay_in_bounds_and_answer_differently(max_side):
    rules, rng = drawn(60, max_side)
    whole = 0
    for rule in rules:
        json.dumps(rule.parameters)
        try:
            pairs = draw_pairs(rule, rng, 4)
        except ValueError:  # few have not so many; whoever draws puzzles takes another one
            continue
        whole += 1
        for given, solved in pairs:
            before = given.copy()
            again = rule.solve(given.copy())
            assert np.array_equal(again, solved) and np.array_equal(given, before), rule.parameters
            assert not np.array_equal(given, solved)
            assert all(1 <= side <= max_side for side in (*given.shape, *solved.shape))
            assert min(given.min(), solved.min()) >= 0 and max(given.max(), solved.max()) <= 9
    assert whole >= 0.8 * len(rules)


def test_programs_depend_on_the_seed_alone_and_hardly_ever_repeat():
    first, again, other = (drawn(100, 10, seed)[0] for seed in (1, 1, 2))
    texts = [[json.dumps(rule.parameters) for rule in rules] for rules in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len({*texts[0], *texts[2]}) >= 195


def test_every_scene_and_operation_occurs_about_as_often():
    rules, _ = drawn(2000, 10)
    scenes = [rule.parameters["scene"] for rule in rules]
    firsts = [rule.parameters["operations"][0]["operation"] for rule in rules]
    assert {*scenes} == {*SCENES} and {*firsts} == {*OPERATIONS}
    chosen = [[made["operation"] for made in rule.parameters["operations"]] for rule in rules]
    counts = [sum(name in names for names in chosen) for name in OPERATIONS]
    assert min(counts) > 0.25 * np.mean(counts) and max(counts) < 3 * np.mean(counts)
    assert len({name for names in chosen for name in names[1:]}) > 0.9 * len(OPERATIONS)  # they follow others too
    assert all(len({*names}) == len(names) for names in chosen)
    assert all({*suits} <= {*SCENES} for _, suits in OPERATIONS.values())
    # As many operations as are asked for, not as happen to fit.
    lengths = [len(names) for names in chosen]
    for length in {*LENGTHS}:
        assert lengths.count(length) / len(rules) == pytest.approx(LENGTHS.count(length) / len(LENGTHS), abs=0.04)


def without(steps, given, max_side):
    """What each program gives that lacks some of the operations: nothing where one of them has nothing to do."""
    for kept in itertools.product([False, True], repeat=len(steps)):
        if not all(kept):
            cells = given
            try:
                for step in itertools.compress(steps, kept):
                    cells = step(cells)
                    if max(cells.shape) > max_side:
                        raise Unfit("too large")
            except Unfit:
                continue
            yield cells


def test_no_operation_of_a_program_can_be_left_out(monkeypatch):
    made, build = [], programs._rule

    def remember(scene, steps, max_side):
        made.append(steps)
        return build(scene, steps, max_side)

    monkeypatch.setattr(programs, "_rule", remember)
    rules, rng = drawn(150, 9)
    compared = 0
    for rule, steps in zip(rules, made, strict=True):
        assert len(steps) == len(rule.parameters["operations"])
        try:
            pairs = draw_pairs(rule, rng, 4)
        except ValueError:
            continue
        for given, solved in pairs:
            for other in without(steps, given, 9):
                compared += 1
                assert not np.array_equal(solved, other), rule.parameters
    assert compared > 1000


def test_operations_that_undo_or_hide_others_are_refused():
    def turned(cells):
        return cells[:, ::-1]

    def filled(cells):
        return np.full_like(cells, 5)

    def grown(cells):
        return np.vstack([cells, cells])

    once = programs._advance((grid("12 .."), []), turned, 5)
    assert once[0].tolist() == grid("21 ..").tolist()
    for refused in (turned, filled, lambda cells: cells.copy()):  # undone; the same without the first; no change
        with pytest.raises(Unfit):
            programs._advance(once, refused, 5)
    twice = programs._advance(once, grown, 5)
    assert [other.tolist() for other in twice[1]] == [grid(text).tolist() for text in ("12 ..", "21 ..", "12 .. 12 ..")]
    with pytest.raises(Unfit):
        programs._advance(twice, grown, 5)  # eight rows


def test_objects_touch_by_sides_or_corners_and_by_colour_or_not():
    cells = grid("11.2 .12. ...3")
    assert [(part.size, part.colour) for part in find_objects(cells, True, False)] == [(3, 1), (1, 2), (1, 2), (1, 3)]
    assert [(part.size, part.colour) for part in find_objects(cells, True, True)] == [(3, 1), (2, 2), (1, 3)]
    assert [part.size for part in find_objects(cells, False, False)] == [4, 1, 1]
    [whole] = find_objects(cells, False, True)
    assert whole.size == 6 and whole.box == (slice(0, 3), slice(0, 4))
    assert (whole.mask() == (cells != 0)).all()
    assert find_objects(np.zeros((2, 2), dtype=int), True, True) == []


def test_what_is_inside_cannot_be_left_by_sides():
    cells = grid("...... .111.. .1.1.. .11... ......")
    assert np.argwhere(inside_of(cells)).tolist() == [[2, 2]]
    assert not inside_of(grid("111 1.. 111")).any()
    assert neighbours_of(grid("11. ... ..1") > 0, corners=False).tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 0]]
    assert neighbours_of(grid("11. ... ..1") > 0, corners=True).tolist() == [[1, 1, 1], [2, 3, 2], [0, 1, 0]]


# Each operation with the choices that it makes, in order, and what it does to a grid: None where it has to refuse it.
EXAMPLES = [
    ("outline", [3, 0], "..... ..1.. .....", "..3.. .313. ..3.."),
    ("outline", [3, 1], "..... ..1.. .....", ".333. .313. .333."),
    ("fill_inside", [4, 0.5], "111. 1.1. 111.", "111. 141. 111."),
    ("fill_inside", [4, 0.9], "111. 1.1. 111.", "1114 1.14 1114"),
    ("hollow", [0.0, 0], "1111 1111 1111", "1111 1..1 1111"),
    ("turn", [2], "12 3.", "3. 12"),
    ("turn", [1], "12 3.", "13 2."),
    ("tile", [(1, 2), 0.0], "12", "1212"),
    ("tile_by_cells", [0.9], "1. .2", "1... .2.. ..1. ...2"),
    ("enlarge", [(1, 2)], "12 3.", "1122 33.."),
    ("take_part", ["inner"], "111 1.2 111", "."),
    ("take_part", ["left"], "123 456", "12 45"),
    ("squeeze", ["around"], "... .12 ...", "12"),
    ("squeeze", ["black"], "1.2 ... 3.4", "12 34"),
    ("squeeze", ["repeated"], "112 112 33.", "12 3."),
    ("squeeze", ["around"], "...", None),
    ("surround", [5, 1], "1", "555 515 555"),
    ("surround", [5, 0], "1111 1111 1111", "5555 5115 5555"),
    ("sort_lines", [0, 1], "111 1.. 11.", "1.. 11. 111"),
    ("complete", [(4,)], "1.. .2.", "1.1 .2."),
    ("show_covered", [], "1221 2..2 2332 1221", "33"),
    ("show_covered", [], "12 21", None),
    ("continue_pattern", [], "1212... 2121...", "1212121 2121212"),
    ("combine_panels", [7, "all"], "1.521 .152. ..5.2", "7. .. .."),
    ("combine_panels", [7, "none"], "1.5.. .15..", ".7 7."),
    ("combine_panels", [7, "all"], "1. .1", None),
    ("overlay_panels", [1], "115.2 ..52.", "12 2."),
    ("overlay_panels", [0], "115.2 ..52.", "11 2."),
    ("choose_panel", ["cells"], "1.522 .15.2", "22 .2"),
    ("choose_panel", ["cells"], "1.52. .15.2", None),
    ("count_colours", ["most"], "122 .2.", "2"),
    ("count_colours", ["least"], "122 .2.", "1"),
    ("count_colours", ["order"], "122 .2.", "2 1"),
    ("count_colours", ["bars"], "122 .2.", "222 1.."),
    ("count_colours", ["most"], "12", None),
    ("invert", [], ".1 1.", "1. .1"),
    ("invert", [], ".1 2.", None),
    ("fall", [0.9], "12. .3. 4..", "... 12. 43."),
    ("colour_by_place", ["board", 2, 0, 6, "black"], ".1. ...", "616 .6."),
    ("connect", [0.9, (0,)], "2..2 1..2", "2222 1..2"),
    ("fall", [0.1, 2], "2 1 3", "1 3 2"),
    ("hollow", [0.9, 6, 1], "111 111 111", "111 161 111"),
    ("keep_objects", [1, 0, "most", "size", 1], "11..2 .....", "11... ....."),
    ("keep_objects", [1, 0, "most", "size", 0], "11..2 .....", "....2 ....."),
    ("keep_objects", [1, 0, "most", "size", 1], "11.22", None),
    ("keep_objects", [1, 0, "yes", "holes", 1], "111.2 1.1.2 111.2", "111.. 1.1.. 111.."),
    ("keep_objects", [1, 0, "no", "edge", 0], "..... .1..2 .....", "..... ....2 ....."),
    ("keep_objects", [1, 0, "alone", None, "colour", 1], "1.2.1", "..2.."),
    ("keep_objects", [1, 0, "common", None, "shape", 1], "11.2.33", "11...33"),
    ("keep_objects", [1, 0, "least", "top", 1], "1.. ... ..2", "... ... ..2"),
    ("keep_objects", [1, 0, "most", "size", 1], "... ...", None),
    ("cut_out", [0, 0, "most", "size", 0], "12..3 11...", "12 11"),
    ("cut_out", [1, 0, "least", "left", 1], "11.2 1..2", "2 2"),
    ("recolour_objects", [1, 0, "most", "size", 1], "33..4", "11..2"),
    ("recolour_objects", [1, 0, "most", "size", 0], "33..4", "11..4"),
    ("colour_by_rank", [1, 0, "size", 3], "33..4", "11..2"),
    ("colour_by_rank", [1, 0, "size", 3], "3..4", None),
    ("colour_by_size", [1, 0, 2], "33.4.555", "22.1.222"),
    ("move_objects", [1, 0, (0, 1), 1, 1, 0.9], "1..2.", "...12"),
    ("move_objects", [1, 0, (0, 1), 0, 2, 0.9], "1...2", "..1.2"),
    ("move_objects", [1, 0, (0, 1), 1, 1, 0.1, 2], "1.2..", "1...2"),
    ("move_objects", [1, 0, (0, 1), 1, 1, 0.9], "1.............", ".............1"),
    ("turn_objects", [0, 0, "left-right"], "12.. 1...", "21.. .1.."),
    ("fill_boxes", [1, 1, 0.9], "1.. .1. 11.", "11. 11. 11."),
    ("fill_boxes", [1, 1, 0.1, 7], "1.. .1. 11.", "17. 71. 11."),
    ("count_objects", [1, 0, 5, "row"], "1.1 ..1", "55"),
    ("count_objects", [1, 0, 5, "diagonal"], "1.1 ..1", "5. .5"),
    ("count_objects", [1, 0, 5, "square"], "1.1 ..1", "55. ... ..."),
    ("count_objects", [1, 0, 5, "colours"], "1.22", "21"),
    ("count_objects", [1, 0, 5, "row"], "...", None),
    ("stamp", [0.9, 1, 0.1, *[0.9] * 7, 0.9, 0.1, 6], "1.. ..2", "16. ..2"),
    ("stamp", [0.9, 1, 0.1, *[0.9] * 7, 0.1, 0.9], "1... ...2", "111. ...2"),
    ("shoot", [0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 1, 0.1], "1.2.", "1122"),
    ("shoot", [0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 1, 0.9], "1....", "1.1.1"),
    ("shoot", [0.1, 0.1, 0.9, 0.9, 0.9, 0.1, 1, 0.9, 1, 0.9], "1..2.", "1.12."),
    ("shoot", [0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.1, 7, 0, 0.1], "1.2.", "1727"),
    ("fill_lines", [(0,), 0.9, 1, 7], "1.. ..2", "177 ..2"),
    ("fill_lines", [(0,), 0.1, 1, 7], "1.. ...", "1.. 777"),
    ("neighbour_rule", [0, 1, 1, 0, 0.9, 5], "1.. ...", "15. 5.."),
    ("map_colours", [0.1, 0.1, 0.1], "12.", "21."),
    ("clean", [0, 1], "1.22", "..22"),
    ("shift", [0, 1, 0.9], "123", "312"),
    ("shift", [1, 1, 0.1], "123 123", "123 312"),
    ("connect", [0.1, 8, (0, 1)], "2..2 .... ...2", "2882 ...8 ...2"),
    ("keep_objects", [1, 0, "yes", "square", 1], "11.22 11...", "11... 11..."),
    ("keep_objects", [1, 0, "no", "even", 1], "11.2", "...2"),
    ("side_of_line", ["empty", 1], ".2. 111 3..", "... 111 3.."),
    ("side_of_line", ["black", 0, 5], ".2. 111 3..", ".2. 111 355"),
    ("side_of_line", ["objects", 1, 5], "21. .1. .1.", "51. .1. .1."),
    ("side_of_line", ["empty", 1], ".2. ... 3..", None),
    ("copy_over_line", [1, 0.1], "2.. ... 111 ... ..3", "2.. ... 111 ... 2.3"),
    ("copy_over_line", [0, 0.1], "2.. ... 111 ... ..3", "2.3 ... 111 ... ..3"),
    ("copy_over_line", [1, 0.9], "2.. ... 111 ... ..3", "2.. ... 111 2.. ..3"),
    ("copy_over_line", [1, 0.9], "2.. 111 ... ...", None),
    ("move_to_line", [1, 0, 0.1], "2.. ... 111 ... ..3", "... 2.. 111 ..3 ..."),
    ("move_to_line", [1, 0, 0.1], "1..2 1... 1...", "12.. 1... 1..."),
    ("move_to_line", [1, 0, 0.9], "... 2.. 111", "2.. ... 111"),
    ("reach_line", ["own", 7], "2.. ... 111", "2.. 2.. 111"),
    ("reach_line", ["line", 7], "1..2 1... 1.2.", "1112 1... 112."),
    ("reach_line", ["other", 7], "2.. ... 111", "2.. 7.. 111"),
    ("reduce_objects", [1, 0, "corners", 0.9], "111 111 111", "1.1 ... 1.1"),
    ("reduce_objects", [1, 0, "middle", 0.9], "1111 1111 1111", ".... .11. ...."),
    ("reduce_objects", [1, 0, "frame", 0.1, 5], "111 111 111", "555 515 555"),
    ("reduce_objects", [1, 0, "row", 0.9], ".1. 111", "111 ..."),
    ("reduce_objects", [1, 0, "column", 0.9], ".1. 111", "1.. 1.."),
    ("align", [("first", "middle")], "... ..1 ...", ".1. ... ..."),
    ("align", [("as it is", "last")], "1.. ...", "..1 ..."),
    ("align", [("middle", "first")], "1. ..", None),
    ("smooth", [1, 8], "111 1.1 111", "111 111 111"),
    ("smooth", [0], "..... .1.2. ..22.", "..... ...2. ..22."),
    ("complete_objects", [1, 0, (4,)], "11. 1.. ...", "11. 11. ..."),
    ("complete_objects", [1, 0, (2, 4, 6)], ".1. .11 ...", ".11 .11 ..."),
    ("copy_to_marks", ["middle", 0.9, 0.9], "222.. ..... ..3..", "222.. ..... .222."),
    ("copy_to_marks", ["corner", 0.1, 0.9], "222.. ..... ..3..", "222.. ..... ..333"),
    ("copy_to_marks", ["corner", 0.9, 0.1], "222.. ..... ..3..", "..... ..... ..222"),
    ("copy_to_marks", ["middle", 0.9, 0.9], "3...3", None),
    ("repeat_objects", [1, 0, (0, 1), 0, 0, 0.9], "1....", "11111"),
    ("repeat_objects", [1, 0, (0, 1), 1, 1, 0.1, 5], "1....", "1.5.."),
    ("repeat_objects", [1, 0, (1, -1), 0, 0, 0.9], "..1 ... ...", "..1 .1. 1.."),
    ("reflect_objects", [1, 0, (0, 1)], "1... 11..", "1..1 1111"),
    ("reflect_objects", [1, 0, (-1, 0)], "... 11. 1..", "11. 11. 1.."),
    ("approach", [1, 0, 0.9], "11..2", "112.."),
    ("approach", [1, 0, 0.1, 2], "2...1", "21..."),
    ("approach", [1, 0, 0.9], "3.4 ... 22.", "..4 3.. 22."),
    ("approach", [1, 0, 0.9], "..... 1.... 1..2. 1.... 11111", "..... 1.... 1.... 1..2. 11111"),
    ("approach", [1, 0, 0.9], "1..2", None),
    ("list_objects", [1, 0, 1, 0.9, 1], "..2 1..", "12"),
    ("list_objects", [1, 0, 1, 0.1, 0], "..2 1..", "2 1"),
    ("list_objects", [1, 0, 1, 0.9, 1], "1. 2.", None),
    ("colour_like", [2, 0.9, 0.9], "11... ..... 22..1", "22... ..... 22..1"),
    ("colour_like", [2, 0.1, 5, 0.9], "11... ..... 22..1", "11... ..... 22..5"),
    ("colour_like", [2, 0.9, 0.1], "1.... 1.... ..22.", "2.... 2.... ..22."),
    ("colour_like", [2, 0.9, 0.1], "1.. ..1", None),
    ("swell", [0.1, 0], "..... ..1.. .....", "..1.. .111. ..1.."),
    ("swell", [0.1, 1], "1.2", "1.2"),
    ("swell", [0.1, 0], "1...2", "11.22"),
    ("swell", [0.9, 0], "..... .111. .111. .111.", "..... ..... ..1.. ..1.."),
    ("pattern_objects", [1, 0, "board", 0.9, 5, 0], "111 111", "515 151"),
    ("pattern_objects", [1, 0, "rings", 0.1, 1], "111 111 111", "111 1.1 111"),
    ("pattern_objects", [1, 0, "columns", 0.1, 1], ".111 .1.1", ".1.1 .1.1"),
    ("pattern_objects", [1, 0, "diagonals", 0.9, 5, 0], "111 111 111", "515 151 515"),
    ("fill_areas", ["largest"], "2222222 2..2.22 2222222", "2222222 2112.22 2222222"),
    ("fill_areas", ["smallest"], "2222222 2..2.22 2222222", "2222222 2..2122 2222222"),
    ("fill_areas", ["even"], "2222222 2..2.22 2222222", "2222222 2112.22 2222222"),
    ("fill_areas", ["odd"], "2222222 2..2.22 2222222", "2222222 2..2122 2222222"),
    ("fill_areas", ["square"], "2222222 2..2.22 2222222", "2222222 2..2122 2222222"),
    ("fill_areas", ["sizes"], "3333333 3..3.33 3333333", "3333333 3223133 3333333"),
    ("fill_areas", ["largest"], "222 2.2 222", None),
    ("open_frame", ["largest", 0.9], "1111.222 1.31.2.2 1111.222", ".3"),
    ("open_frame", ["fullest", 0.1], "1111.222 1.31.2.2 1111.222", "1111 1.31 1111"),
    ("open_frame", ["smallest", 0.9], "1111.222 1.31.2.2 1111.222", "."),
    ("open_frame", ["largest", 0.9], "11.", None),
    ("empty_frames", [1, 0.1], "111.2 131.. 111..", "111.2 1.1.. 111.."),
    ("empty_frames", [0, 0.9, 5], "111.2 131.. 111..", "111.5 131.. 111.."),
    ("spread_mark", ["frame"], "111 131 111", "333 333 333"),
    ("spread_mark", ["inside"], "1111 13.1 1111", "1111 1331 1111"),
    ("spread_mark", ["exchange"], "1111 13.1 1111", "3333 31.3 3333"),
    ("spread_mark", ["frame"], "1111 1321 1111", None),
    ("count_in_frames", [1], "222.333 2.2.343 222.333", "111.222 1.1.242 111.222"),
    ("list_layers", ["down", 1], "11. 133 .33", "31"),
    ("list_layers", ["lowest", 1], "11. 133 .33", "1"),
    ("list_layers", ["up", 0], "11. 133 .33", "1 3"),
    ("list_layers", ["top", 0], "1.3", None),
    ("restack", ["raise"], "11. 133 .33", "11. 113 .33"),
    ("restack", ["lift"], "11. 133 .33", "11. 11. ..."),
    ("restack", ["reverse"], "11... 1222. .2333 ..333", "11... 1122. .2223 ..333"),
    ("exchange_layers", [1], "11. 133 .33", "33. 311 .11"),
    ("exchange_layers", [0], "11111 12221 12321 12221 11111", "22222 23332 23132 23332 22222"),
    ("summarise_panels", ["any", 7], "1.5.. ..5.. 55555 ..5.2 ..5..", "7. .7"),
    ("summarise_panels", ["colour", 7], "1.5.. ..5.. 55555 ..5.2 ..5..", "1. .2"),
    ("summarise_panels", ["full", 7], "115.. 55555 ..522", "7. .7"),
    ("summarise_panels", ["fullest", 7], "1.522 55555 ..5..", ".7 .."),
    ("summarise_panels", ["odd", 7], "1.522 55555 ..5.3", "7. .7"),
    ("summarise_panels", ["colour", 7], "12522 55555 ..5..", None),
    ("odd_panel", ["unlike"], "1.51. 55555 1.5.1", ".1"),
    ("odd_panel", ["fullest"], "115.. 55555 1.5.1", "11"),
    ("odd_panel", ["emptiest"], "115.. 55555 1.5.1", ".."),
    ("odd_panel", ["fullest"], "1.5.1 55555 ..5..", None),
    ("fill_panels", ["overlay", 7], "1.5.. 55555 225..", "12512 55555 12512"),
    ("fill_panels", ["mirror", 7], "1.5.. 55555 ..5..", "1.5.1 55555 1.5.1"),
    ("fill_panels", ["fullest", 7], "115.1 55555 ..5..", "775.1 55555 ..5.."),
    ("fill_panels", ["used", 7], "115.1 55555 ..5..", "77577 55555 ..5.."),
    ("fill_panels", ["fullest", 7], "1.2 ..1", None),
    ("bounce", [0.9, 1, 1, 0.9], "1.. ... ... ...", "1.. .1. ..1 .1."),
    ("bounce", [0.1, 2, -1, -1, 0.1, 7], "... ... 1.2", "7.. .7. 1.2"),
    ("bounce", [0.9, 1, 1, 0.9], "1. ..", None),
    ("stairs", [0.9, (1, 1), 1, 1, 0.9], "1.. ... ...", "11. .11 ..1"),
    ("stairs", [0.1, 2, (1, 1), 2, 1, 0.1, 7], "2... .... 1...", "277. ..77 1..."),
    ("crossings", [5, 0.9], "1.. ... ..2", "1.5 ... 5.2"),
    ("crossings", [5, 0.1, 1], "1.. .2. ..1", "1.5 .2. 5.1"),
    ("connect_bent", [1, 0.9], "1.. ... ..1", "111 ..1 ..1"),
    ("connect_bent", [0, 0.1, 7], "1.. .2. ..1", "1.. 72. 771"),
    ("between", ["row", 5], "1.2 ... 3..", "152 ... 3.."),
    ("between", ["column", 5], "1. .. 3.", "1. 5. 3."),
    ("between", ["both", 5], ".1. 1.1 .1.", ".1. 151 .1."),
    ("between", ["either", 5], "1.1 ... 1..", "151 5.. 1.."),
    ("enlarge_by_count", [1], "12", "1122 1122"),
    ("enlarge_by_count", [0], "12", "1212 1212"),
    ("frame_by_count", [1], "112", "11111 11121 11111"),
    ("frame_by_count", [0], "112", "22222 21122 22222"),
    ("frame_by_count", [1], "12", None),
    ("fold", [0, 0.1, "over", 1], "1. .. .2 ..", "1. .2"),
    ("fold", [1, 0.9, "both", 5], "1.22", "5."),
    ("fold", [1, 0.1, "none", 5], "1..2", ".5"),
    ("fold", [0, 0.1, "one", 5], "1. .2", "55"),
    ("fold", [0, 0.1, "one", 5], "1 . 2", None),
    ("level_lines", [0, 0.9], "121 .33 ...", "111 333 ..."),
    ("level_lines", [1, 0.1], "12 1. .2", "12"),
    ("level_lines", [0, 0.9], "12", None),
    ("reach_edge", [1, 0, 1], "...... ...... .1.... ...... ......", "...... ...... 1..... ...... ......"),
    ("reach_edge", [1, 0, 0, 0.9], "..... ..... ..22. ..... ..... .....", "..... ..... ..222 ..... ..... ....."),
    ("reach_edge", [1, 0, 0, 0.1, 3], "..... ..2.. ..2.. ..... ..... .....", "..3.. ..2.. ..2.. ..... ..... ....."),
    ("reach_edge", [1, 0, 1], "...... .1..2. ...... ......", "...... .1..2. ...... ......"),
    ("reach_edge", [1, 0, 1], "..... .1... ..... ...2. ..... .....", "..... .1... ..... ....2 ..... ....."),
    ("colour_by_touch", [0, 0], "333. 333. .5..", "555. 555. ...."),
    ("colour_by_touch", [1, 1], "333. 333. ...5", "555. 555. ...5"),
    ("colour_by_touch", [0, 1], "333. 333. ...5", "333. 333. ...5"),
    ("colour_by_touch", [0, 1], "43335 .333.", None),
    ("collect_objects", [1, 0, 0, "place", 1], "1...22 1..... ......", "1.22 1..."),
    ("collect_objects", [1, 0, 1, "less", 0], "333.1", "1.. 333"),
    ("collect_objects", [1, 0, 1, "size", 0], "333.1", "333 1.."),
    ("collect_objects", [1, 0, 0, "size", 0], "3.1", None),
    ("keep_objects", [1, 0, "yes", "touches", 1], "12..3", "12..."),
    (
        "keep_objects",
        [1, 0, "most", "number of holes", 1],
        "11111.333 1.1.1.3.3 11111.333",
        "11111.... 1.1.1.... 11111....",
    ),
    ("surround", [5, 0], "11 11", None),
]


def test_each_operation_has_an_example():
    assert {name for name, *_ in EXAMPLES} == {*OPERATIONS}


@pytest.mark.parametrize("max_side", [3, 4, 5, 10])
def test_what_a_symmetric_scene_covers_can_be_found(max_side):
    # Where the uncovered part shows it, the answer completes the pattern to its own mirror image.
    rng, found = np.random.default_rng(max_side), 0
    for _ in range(200):
        made = SCENES["symmetric"](rng, max_side)
        given = made.draw(rng)
        _, solve = OPERATIONS["show_covered"][0](rng, made.colours)
        try:
            part = solve(given)
        except Unfit:
            continue
        found += 1
        rows, columns = np.nonzero(given == 0)
        whole = given.copy()
        whole[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = part
        assert (whole == whole[::-1]).all() and (whole == whole[:, ::-1]).all() and whole.all()
    assert found > 20


@pytest.mark.parametrize(("name", "choices", "given", "expected"), EXAMPLES)
def test_operations_by_hand(monkeypatch, name, choices, given, expected):
    rng = Choosing(monkeypatch, *choices)
    made, _ = OPERATIONS[name]
    if name == "tile":
        rng.integers = lambda *_, size: np.zeros(size, dtype=int)
    _, solve = made(rng, [1, 2])
    assert rng.left == []
    if expected is None:
        with pytest.raises(Unfit):
            solve(grid(given))
    else:
        assert solve(grid(given)).tolist() == grid(expected).tolist()
