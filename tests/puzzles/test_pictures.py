"""Pictures show the grids that there are, in ARC's colours."""

import io
import re

import numpy as np
import pytest

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.pictures import CELL, PALETTE, WIDEST, grid_html, new_figure, plot_grid, view_html


def cells_of(svg):
    """The colours of a grid's SVG by place: {(x, y): number}."""
    found = re.findall(r'<rect x="(\d+)" y="(\d+)" width="1" height="1" fill="(#\w+)"/>', svg)
    return {(int(x), int(y)): PALETTE.index(colour) for x, y, colour in found}


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (30, 30), (30, 1)])
def test_each_cell_has_its_colour_and_place(shape):
    grid = np.random.default_rng(0).integers(0, 10, shape).astype(np.uint8)
    svg = grid_html(grid)
    assert cells_of(svg) == {(x, y): grid[y, x] for y in range(shape[0]) for x in range(shape[1])}
    width, height = (int(re.search(rf'{name}="(\d+)"', svg).group(1)) for name in ("width", "height"))
    assert (height / shape[0], width / shape[1]) == (min(CELL, WIDEST // max(shape)),) * 2
    assert f"{shape[0]} by {shape[1]} grid" in svg


def test_a_view_shows_all_its_grids_and_what_is_missing():
    grids = [np.full((1, number), number, dtype=np.uint8) for number in range(1, 6)]
    view = {"key": "a<b>_0", "train": [(grids[0], grids[1])], "test": grids[2], "solution": grids[3]}
    page = view_html(view)
    assert re.findall(r"(\d) by (\d) grid", page) == [("1", "1"), ("1", "2"), ("1", "3"), ("1", "4")]
    assert "a&lt;b&gt;_0" in page and "<b>_0" not in page and "<b>?</b>" not in page
    assert "<b>?</b>" in view_html({**view, "solution": None})
    assert view_html({**view, "test": None}).count("<svg") == 2


@pytest.fixture(scope="module")
def ds(demo_dataset):
    return ArcDataset.load_from_local_json(demo_dataset, sizes=(3,))


def test_what_a_notebook_shows_of_a_dataset(ds):
    page = ds._repr_html_()
    assert repr(ds) in page and page.count("<code>") == 3
    assert f"and {len(ds) - 3:,} more" in page
    assert len(page) < 200_000
    assert "more" not in ds.subset(2)._repr_html_()


def test_a_plot_holds_the_views_grids(ds):
    key = ds.augment(seed=0, tp="all", rt="all", perm=True).keys[5]
    figure, view = ds.plot(key), ds[key]
    pairs = [*view["train"], (view["test"], view["solution"])]
    assert len(figure.axes) == 2 * len(pairs)
    for column, pair in enumerate(pairs):
        for row in range(2):
            [image] = figure.axes[row * len(pairs) + column].images
            assert np.array_equal(image.get_array(), pair[row])
            assert image.cmap.colors == PALETTE and image.get_clim() == (0, 9)
    # A cell is as large in one grid as in another.
    assert len({axis.get_xlim()[1] - axis.get_xlim()[0] for axis in figure.axes}) == 1
    assert len({axis.get_ylim()[0] - axis.get_ylim()[1] for axis in figure.axes}) == 1
    assert all(axis.get_xlim()[0] <= -0.5 and axis.get_ylim()[1] <= -0.5 for axis in figure.axes)
    with pytest.raises(ValueError, match="no puzzle"):
        ds.plot("nothing_0")


def test_a_missing_grid_is_a_question_mark():
    figure = new_figure(2, 2)
    axis = figure.subplots()
    plot_grid(axis, None, "guess")
    assert [text.get_text() for text in axis.texts] == ["?"] and not axis.images
    figure.savefig(io.BytesIO())
