"""Families of rules: every output, computed again by an independent solver."""

import json

import pytest

from arc.generation.families import FAMILIES, generate

Rows = list[list[int]]

# ---------------------------------------------------------------------------------------------------------------------
# The verifier: every rule again, cell by cell on plain lists, from its parameters as rules.txt gives them.


def solve_flip(g: Rows, axis: str) -> Rows:
    return [row[::-1] for row in g] if axis == "left-right" else g[::-1]


def solve_rotate(g: Rows, degrees: int) -> Rows:
    for _ in range(degrees // 90):  # counter-clockwise: the last column becomes the first row
        g = [[row[c] for row in g] for c in reversed(range(len(g[0])))]
    return g


def solve_transpose(g: Rows, diagonal: str) -> Rows:
    h, w = len(g), len(g[0])
    if diagonal == "main":
        return [[g[r][c] for r in range(h)] for c in range(w)]
    return [[g[h - 1 - r][w - 1 - c] for r in range(h)] for c in range(w)]


def solve_recolour(g: Rows, map: list[int]) -> Rows:  # noqa: A002 - the parameter's name in the file
    return [[map[v] for v in row] for row in g]


def solve_swap_colours(g: Rows, colours: list[int]) -> Rows:
    low, high = colours
    return [[high if v == low else low if v == high else v for v in row] for row in g]


def solve_keep_colour(g: Rows, colour: int) -> Rows:
    return [[v if v == colour else 0 for v in row] for row in g]


def solve_translate(g: Rows, down: int, right: int, wrap: bool) -> Rows:
    h, w = len(g), len(g[0])
    out = [[0] * w for _ in range(h)]
    for r in range(h):
        for c in range(w):
            to_r, to_c = r + down, c + right
            if wrap:
                to_r, to_c = to_r % h, to_c % w
            if 0 <= to_r < h and 0 <= to_c < w:
                out[to_r][to_c] = g[r][c]
    return out


def turned(g: Rows, direction: str) -> Rows:
    """Turn a grid so that `direction` points right; `turned_back` undoes it. By rotations, unlike the generator."""
    return solve_rotate(g, {"right": 0, "down": 90, "left": 180, "up": 270}[direction])


def turned_back(g: Rows, direction: str) -> Rows:
    return solve_rotate(g, {"right": 0, "down": 270, "left": 180, "up": 90}[direction])


def solve_gravity(g: Rows, direction: str) -> Rows:
    lines = [[v for v in row if v] for row in turned(g, direction)]
    width = len(turned(g, direction)[0])
    return turned_back([[0] * (width - len(line)) + line for line in lines], direction)


def solve_rays(g: Rows, direction: str) -> Rows:
    lines = [list(row) for row in turned(g, direction)]
    for row in lines:
        for c in range(1, len(row)):
            row[c] = row[c] or row[c - 1]
    return turned_back(lines, direction)


def solve_mirror_extend(g: Rows, direction: str) -> Rows:
    if direction == "right":
        return [row + row[::-1] for row in g]
    if direction == "left":
        return [row[::-1] + row for row in g]
    return g + g[::-1] if direction == "down" else g[::-1] + g


def solve_repeat(g: Rows, direction: str) -> Rows:
    return [row + row for row in g] if direction == "right" else g + g


def solve_scale(g: Rows, rows: int, columns: int) -> Rows:
    return [[v for v in row for _ in range(columns)] for row in g for _ in range(rows)]


def solve_symmetrise(g: Rows, direction: str) -> Rows:
    lines = [list(row) for row in turned(g, direction)]
    for row in lines:
        for c in range(len(row) // 2):
            row[len(row) - 1 - c] = row[c]
    return turned_back(lines, direction)


def solve_border(g: Rows, colour: int) -> Rows:
    h, w = len(g), len(g[0])
    return [[colour if r in (0, h - 1) or c in (0, w - 1) else g[r][c] for c in range(w)] for r in range(h)]


def solve_crop(g: Rows, background: int) -> Rows:
    def trimmed(lines: Rows) -> Rows:
        while all(v == background for v in lines[0]):
            lines = lines[1:]
        while all(v == background for v in lines[-1]):
            lines = lines[:-1]
        return lines

    return solve_transpose(trimmed(solve_transpose(trimmed(g), "main")), "main")


def solve_count(g: Rows, colour: int) -> Rows:
    return [[colour for row in g for v in row if v == colour]]


def solve_combine(g: Rows, operation: str, line: int, colour: int) -> Rows:
    half = len(g[0]) // 2
    assert all(row[half] == line for row in g)
    wanted = {"and": (2,), "or": (1, 2), "xor": (1,)}[operation]
    return [[colour if (row[c] > 0) + (row[half + 1 + c] > 0) in wanted else 0 for c in range(half)] for row in g]


def test_the_verifier_itself_on_a_grid_solved_by_hand():
    grid = [[0, 1, 0], [2, 0, 3]]
    assert solve_rotate(grid, 90) == [[0, 3], [1, 0], [0, 2]]
    assert solve_transpose(grid, "other") == [[3, 0], [0, 1], [2, 0]]
    assert solve_gravity(grid, "down") == [[0, 0, 0], [2, 1, 3]]
    assert solve_gravity(grid, "up") == [[2, 1, 3], [0, 0, 0]]
    assert solve_gravity(grid, "left") == [[1, 0, 0], [2, 3, 0]]
    assert solve_rays(grid, "up") == [[2, 1, 3], [2, 0, 3]]
    assert solve_rays(grid, "right") == [[0, 1, 1], [2, 2, 3]]
    assert solve_symmetrise(grid, "right") == [[0, 1, 0], [2, 0, 2]]
    assert solve_symmetrise(grid, "left") == [[0, 1, 0], [3, 0, 3]]
    assert solve_translate(grid, 1, -1, wrap=False) == [[0, 0, 0], [1, 0, 0]]
    assert solve_translate(grid, 1, -1, wrap=True) == [[0, 3, 2], [1, 0, 0]]
    assert solve_crop([[7, 7, 7], [7, 1, 7], [7, 7, 7]], 7) == [[1]]
    assert solve_scale([[1, 2]], 2, 1) == [[1, 2], [1, 2]]
    assert solve_combine([[1, 5, 2], [0, 5, 4]], "xor", 5, 8) == [[0], [8]]


@pytest.mark.parametrize("max_side", [3, 5, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_follows_from_its_rule(family, max_side):
    solve = globals()[f"solve_{family.replace('-', '_')}"]
    tasks = generate([family], tasks_per_family=10, examples=60, max_side=max_side, seed=1)
    for name, (parameters, pairs) in tasks.items():
        parameters = json.loads(json.dumps(parameters))  # as a reader of rules.txt gets them
        assert len(pairs) == 60
        assert len({json.dumps(pair["input"]) for pair in pairs}) == 60, f"{name} repeats an input"
        for pair in pairs:
            assert pair["output"] == solve(pair["input"], **parameters), (name, parameters, pair["input"])
            assert pair["output"] != pair["input"], f"{name}: an example that shows nothing"
            for grid in pair.values():
                assert 1 <= len(grid) <= max_side
                assert 1 <= len(grid[0]) <= max_side
                assert {len(row) for row in grid} == {len(grid[0])}
                assert all(type(v) is int and 0 <= v <= 9 for row in grid for v in row)
    rules = [json.dumps(parameters, sort_keys=True) for parameters, _ in tasks.values()]
    assert len(set(rules)) == len(rules), "two tasks of one rule"
