"""From views to token ids, for trainers and decoders. Never imports torch.

Where the tokenizer gives one token per cell, the ids of a batch are built from the arrays without the tokenizer. Else
the text is tokenised, and spans come from character offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from arc.puzzles.dataset import ArcDataset
from arc.puzzles.keys import COLOURS, seeded_rng, shortened_key
from arc.puzzles.text import does_not_fit, format_grid


class _Layout(NamedTuple):
    """The grids of a batch of samples, at one token per cell. G grids, S samples."""

    keys: list[str]
    grids: np.ndarray  # int64 (G,), numbers in the store
    sample: np.ndarray  # int64 (G,), which sample each belongs to
    is_output: np.ndarray  # bool (G,)
    rows: np.ndarray  # int64 (G,), rows as turned
    tokens: np.ndarray  # int64 (G,), tokens with what stands around the grid
    lengths: np.ndarray  # int64 (S,), tokens
    symmetries: np.ndarray  # int64 (S, 3), see `View`
    colours: np.ndarray  # uint8 (S, 10)


class SampleEncoder:
    """Turns keys into token ids.

    Attributes:
        one_token_per_cell: whether ids are built from the arrays; else the tokenizer is called on the text. Tested on
            a text with every number of up to three digits and every seam of the format.
    """

    def __init__(self, tokenizer: Any, preprompt: str, query_beg: str, reply_beg: str, reply_end: str, lines_sep: str):
        """Test how a fast tokenizer of transformers splits the format; for the texts see `format_options`."""
        self.tokenizer = tokenizer
        self.format = {
            "preprompt": preprompt, "query_beg": query_beg, "reply_beg": reply_beg, "reply_end": reply_end,
            "lines_sep": lines_sep,
        }  # fmt: skip
        plain, full = self._ids(preprompt), tokenizer(preprompt)["input_ids"]
        added = len(full) - len(plain)
        self.prefix = np.array(full, dtype=np.int32)  # BOS, if the tokenizer adds it, and the preprompt
        self._query_beg, self._reply_beg, self._reply_end, self._lines_sep = (
            np.array(self._ids(text), dtype=np.int32) for text in (query_beg, reply_beg, reply_end, lines_sep)
        )
        digits = [self._ids(digit) for digit in COLOURS]
        self.one_token_per_cell = (
            full[added:] == plain  # nothing is added at the end
            and all(len(ids) == 1 for ids in digits)
            and len({ids[0] for ids in digits}) == 10
            and len(self._lines_sep) == 1
        )
        if self.one_token_per_cell:
            self._digits = np.array([ids[0] for ids in digits], dtype=np.int32)
            self.one_token_per_cell = self._seams_hold()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _seams_hold(self) -> bool:
        """Whether the ids of pieces, put together, are the ids of the whole text."""
        numbers = [f"{i:0{width}d}" for width in (1, 2, 3) for i in range(10**width)]
        long = ["0123456789" * 3, "9876543210" * 3]
        grids = [[a, b] for a in COLOURS for b in COLOURS] + [long, [row[:29] for row in long], numbers]
        text, ids = self.format["preprompt"], list(self.prefix)
        for rows in grids:
            cells = [[*self._digits[[int(c) for c in row]], *self._lines_sep] for row in rows]
            body = [i for row in cells for i in row][: -len(self._lines_sep)]
            grid = self.format["lines_sep"].join(rows)
            text += self.format["query_beg"] + grid + self.format["reply_beg"] + grid + self.format["reply_end"]
            ids += [*self._query_beg, *body, *self._reply_beg, *body, *self._reply_end]
        return list(self.tokenizer(text)["input_ids"]) == [int(i) for i in ids]

    def encode(
        self, ds: ArcDataset, keys: Sequence[str], max_tokens: int | None = None, reply: bool = True
    ) -> list[dict[str, Any]]:
        """Token ids of views; best in batches of 64 or more.

        Args:
            ds: holds the puzzles.
            keys: views.
            max_tokens: limit, BOS included; demonstrations are dropped from the end until a sample fits.
            reply: whether the solution, if known, follows the query; False: a prompt that ends with `reply_beg`.

        Returns:
            For each key: key (with the `ex...` of what fits); input_ids int32 (tokens,), as the tokenizer gives them
                for
            `task["text"]` (for a prompt `task["input"]`); reply_spans int32 (replies, 2), token positions [start, end)
            of each reply with its end, demonstrations first.

        Raises:
            ValueError: a sample is too long with one demonstration, a prompt has no test input, or a key is wrong.
        """
        if not self.one_token_per_cell:
            return self._encode_texts(ds, list(keys), max_tokens, reply)
        return self._assemble(ds, self._layout(ds, keys, max_tokens, reply)) if len(keys) else []

    def encode_reply(self, grid: np.ndarray) -> np.ndarray:
        """Token ids of a grid (height, width) as a reply with its end, int32 (tokens,).

        They equal the reply's span in `encode` where this grid is the solution, as the view shows it.
        """
        if not self.one_token_per_cell:
            # Behind a query, because some tokenizers mark where a text begins.
            query = self.format["preprompt"] + self.format["query_beg"] + COLOURS[0] + self.format["reply_beg"]
            reply = format_grid(grid, self.format["lines_sep"]) + self.format["reply_end"]
            encoded = self.tokenizer(query + reply, return_offsets_mapping=True)
            offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64)
            behind = (offsets[:, 1] > offsets[:, 0]) & (offsets[:, 0] >= len(query))  # a token belongs where it starts
            return np.array(encoded["input_ids"], dtype=np.int32)[int(np.argmax(behind)) :]
        cells = np.full((len(grid), grid.shape[1] + 1), self._lines_sep[0], dtype=np.int32)
        cells[:, :-1] = self._digits[grid]
        return np.concatenate([cells.ravel()[:-1], self._reply_end])

    def lengths(
        self, ds: ArcDataset, keys: Sequence[str], max_tokens: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of views, int64 (keys,), and which of them lose demonstrations, bool (keys,). See `encode`."""
        if self.one_token_per_cell:
            layout = self._layout(ds, keys, max_tokens, reply=True)
            shortened, lengths = layout.keys, layout.lengths
        else:
            rows = self._encode_texts(ds, list(keys), max_tokens, reply=True)
            shortened = [row["key"] for row in rows]
            lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
        return lengths, np.array([a != b for a, b in zip(keys, shortened, strict=True)], dtype=bool)

    def too_long(self, ds: ArcDataset, keys: Sequence[str], max_tokens: int, turned: bool = True) -> list[str]:
        """Keys whose longest view is over `max_tokens` (BOS included) with only its largest demonstration.

        The length depends on the orientation, not on the colours: a grid of many rows has more line ends. `turned`
        False: only the orientation of the keys counts.

        Where digits merge, one token per cell is an upper bound. Only puzzles over it are tokenised, in their original
        colours. That is exact for Llama 3, which merges digits by their number alone.
        """
        beyond = []
        for begin in range(0, len(keys), 4096):
            batch = keys[begin : begin + 4096]
            worst = np.zeros(len(batch), dtype=np.int64)
            for turn in (0, 1) if turned else (0,):
                layout = self._layout(ds, batch, None, reply=True, turn=turn)
                pair = layout.tokens[:-1] + layout.tokens[1:]
                is_pair = layout.is_output[1:] & ~layout.is_output[:-1]  # no output ever stands first in a sample
                # The last two grids of a sample are its test pair, if it has both; only demonstrations can be left out.
                last = np.cumsum(np.bincount(layout.sample, minlength=len(batch))) - 1
                views = [ds.resolve(key) for key in batch]
                tests = np.array([view.query >= 0 and view.solution >= 0 for view in views])
                is_pair[last[tests] - 1] = False
                largest = np.zeros(len(batch), dtype=np.int64)
                np.maximum.at(largest, layout.sample[1:][is_pair], pair[is_pair])
                worst = np.maximum(worst, len(self.prefix) + largest + np.where(tests, pair[last - 1], 0))
            beyond += [key for key, tokens in zip(batch, worst.tolist(), strict=True) if tokens > max_tokens]
        if self.one_token_per_cell:
            return beyond
        return [key for key in beyond if self._longest_text(ds, key, turned) > max_tokens]

    def _longest_text(self, ds: ArcDataset, key: str, turned: bool) -> int:
        texts = [
            ds.fmt_task(f"{key}{turn}.ex{i}", **self.format)["text"]
            for turn in (("", ".tp") if turned else ("",))
            for i in range(len(ds.resolve(key).order))
        ]
        return max(len(ids) for ids in self.tokenizer(texts)["input_ids"])

    def _layout(
        self, ds: ArcDataset, keys: Sequence[str], max_tokens: int | None, reply: bool, turn: int = 0
    ) -> _Layout:
        """Grids and lengths of samples, shortened as needed; `turn` 1: as if every key was transposed."""
        views = [ds.resolve(key) for key in keys]
        numbers: list[int] = []
        counts = []  # grids of each sample
        for key, view in zip(keys, views, strict=True):
            before, first = len(numbers), view.train.first
            for i in view.order:
                numbers += (first + 2 * i, first + 2 * i + 1)
            if not reply:
                if view.query < 0:
                    raise ValueError(f"key {key!r} names no test input to make a prompt of, expected PUZZLE_INDEX")
                numbers.append(view.query)
            elif view.solution >= 0:
                numbers += (view.query, view.solution)
            counts.append(len(numbers) - before)
        grids, sizes = np.array(numbers, dtype=np.int64), np.array(counts, dtype=np.int64)
        sample = np.arange(len(keys)).repeat(sizes)
        begins = np.cumsum(sizes) - sizes
        is_output = (np.arange(len(grids)) - begins[sample]) % 2 == 1
        symmetries = np.array([view.symmetry for view in views], dtype=np.int64)
        heights, widths = ds.store.heights[grids].astype(np.int64), ds.store.widths[grids].astype(np.int64)
        rows = np.where(symmetries[sample, 0] ^ turn, widths, heights)
        around = np.where(is_output, len(self._reply_end), len(self._query_beg) + len(self._reply_beg))
        tokens = heights * widths + (rows - 1) + around
        lengths = len(self.prefix) + np.add.reduceat(tokens, begins)
        shortened = list(keys)
        if max_tokens is not None and (lengths > max_tokens).any():
            keep = np.ones(len(grids), dtype=bool)
            for s in np.flatnonzero(lengths > max_tokens).tolist():
                count = len(views[s].order)
                end = begins[s] + 2 * count
                pairs = tokens[begins[s] : end].reshape(count, 2).sum(axis=1)
                fits = lengths[s] - pairs.sum() + np.cumsum(pairs) <= max_tokens
                fitting = int(fits.sum())
                if not fitting:
                    raise does_not_fit(keys[s], int(lengths[s] - pairs[1:].sum()), max_tokens)
                keep[begins[s] + 2 * fitting : end] = False
                lengths[s] -= pairs[fitting:].sum()
                shortened[s] = shortened_key(keys[s], fitting)
            grids, sample, is_output, rows, tokens = (a[keep] for a in (grids, sample, is_output, rows, tokens))
        colours = np.frombuffer("".join(view.colours for view in views).encode("ascii"), np.uint8).reshape(-1, 10) - 48
        return _Layout(shortened, grids, sample, is_output, rows, tokens, lengths, symmetries, colours)

    def _assemble(self, ds: ArcDataset, layout: _Layout) -> list[dict[str, Any]]:
        """Ids of a batch: first the tokens around the grids, then all cells into the other positions."""
        store, grids, sample, rows = ds.store, layout.grids, layout.sample, layout.rows
        heights, widths = store.heights[grids].astype(np.int64), store.widths[grids].astype(np.int64)
        columns = heights + widths - rows
        # A symmetry is affine in flat indices: the view's cell (r, c) is the store's origin + r * down + c * right.
        transposed, mirror_rows, mirror_columns = (layout.symmetries[sample].T == 1).reshape(3, -1)
        down, right = np.where(transposed, 1, widths), np.where(transposed, widths, 1)
        origin = store.offsets[grids] + np.where(mirror_rows, (rows - 1) * down, 0)
        origin += np.where(mirror_columns, (columns - 1) * right, 0)
        down, right = np.where(mirror_rows, -down, down), np.where(mirror_columns, -right, right)
        # One line a row of a grid, its end included but for the last row's.
        grid_of_line = np.arange(len(grids)).repeat(rows)
        ends_of_grids = np.cumsum(rows)
        line = np.arange(len(grid_of_line)) - (ends_of_grids - rows)[grid_of_line]
        line_lengths = columns[grid_of_line] + 1
        line_lengths[ends_of_grids - 1] -= 1
        line_ends = np.cumsum(line_lengths)
        right = right[grid_of_line]
        begins = origin[grid_of_line] + line * down[grid_of_line] - (line_ends - line_lengths) * right
        source = np.arange(line_ends[-1])
        source *= right.repeat(line_lengths)
        source += begins.repeat(line_lengths)
        cells = store.cells.take(source, mode="clip")  # a line's end points beyond its row: replaced below
        lookup = self._digits[layout.colours].ravel()
        body = lookup.take(cells + (10 * sample[grid_of_line]).repeat(line_lengths))
        inner = np.ones(len(line_ends), dtype=bool)
        inner[ends_of_grids - 1] = False
        body[line_ends[inner] - 1] = self._lines_sep[0]

        starts = np.cumsum(layout.lengths) - layout.lengths
        grid_ends = np.cumsum(layout.tokens) + (sample + 1) * len(self.prefix)
        grid_starts = grid_ends - layout.tokens
        ids = np.empty(int(layout.lengths.sum()), dtype=np.int32)
        is_cell = np.ones(len(ids), dtype=bool)
        inputs, outputs = ~layout.is_output, layout.is_output
        for begin, tokens in (
            (starts, self.prefix),
            (grid_starts[inputs], self._query_beg),
            (grid_ends[inputs] - len(self._reply_beg), self._reply_beg),
            (grid_ends[outputs] - len(self._reply_end), self._reply_end),
        ):
            positions = begin[:, None] + np.arange(len(tokens))
            ids[positions], is_cell[positions] = tokens, False
        ids[is_cell] = body
        owner = sample[outputs]
        spans = np.stack((grid_starts[outputs], grid_ends[outputs]), axis=1) - starts[owner][:, None]
        spans = spans.astype(np.int32)
        span_ends = np.cumsum(np.bincount(owner, minlength=len(starts))).tolist()
        # Copies: a row in memory must not hold its whole batch.
        bounds = zip(starts.tolist(), layout.lengths.tolist(), [0, *span_ends[:-1]], span_ends, strict=True)
        return [
            {"key": key, "input_ids": ids[start : start + length].copy(), "reply_spans": spans[a:b].copy()}
            for key, (start, length, a, b) in zip(layout.keys, bounds, strict=True)
        ]

    def _encode_texts(
        self, ds: ArcDataset, keys: list[str], max_tokens: int | None, reply: bool
    ) -> list[dict[str, Any]]:
        """As `encode`, by the tokenizer: digits may merge, but the characters of each token are known."""
        shortened, counts = list(keys), [len(ds.resolve(key).order) for key in keys]
        rows: list[dict[str, Any] | None] = [None] * len(keys)
        todo = list(range(len(keys)))
        while todo:
            texts, replies = zip(*(self._text(ds, shortened[i], reply) for i in todo), strict=True)
            encoded = self.tokenizer(list(texts), return_offsets_mapping=True)
            again = []
            for place, i in enumerate(todo):
                ids = encoded["input_ids"][place]
                if max_tokens is not None and len(ids) > max_tokens:
                    counts[i] -= 1
                    if counts[i] < 1:
                        raise does_not_fit(keys[i], len(ids), max_tokens)
                    shortened[i] = shortened_key(shortened[i], counts[i])
                    again.append(i)
                    continue
                offsets = np.asarray(encoded["offset_mapping"][place], dtype=np.int64).reshape(-1, 2)
                # A token belongs to a reply if it starts there; BOS and its like have no characters and start nowhere.
                real = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
                bounds = np.searchsorted(offsets[real, 0], np.array(replies[place], dtype=np.int64).reshape(-1, 2))
                spans = np.append(real, len(ids))[bounds]
                spans[:, 1] = np.append(real, 0)[bounds[:, 1] - 1] + 1
                input_ids = np.array(ids, dtype=np.int32)
                rows[i] = {"key": shortened[i], "input_ids": input_ids, "reply_spans": spans.astype(np.int32)}
            todo = again
        return [row for row in rows if row is not None]

    def _text(self, ds: ArcDataset, key: str, reply: bool) -> tuple[str, list[tuple[int, int]]]:
        """A view's text and the character spans of its replies, computed from the lengths of its pieces."""
        view = ds.resolve(key)
        task = ds.fmt_task(key, **self.format)
        if not reply and view.query < 0:
            raise ValueError(f"key {key!r} names no test input to make a prompt of, expected PUZZLE_INDEX")
        numbers = [n for i in view.order for n in (view.train.first + 2 * i, view.train.first + 2 * i + 1)]
        numbers += [view.query, view.solution] if reply and "reply" in task else []
        heights, widths = ds.store.heights[numbers].astype(int), ds.store.widths[numbers].astype(int)
        rows = widths if view.symmetry[0] else heights
        text_lengths = {name: len(text) for name, text in self.format.items()}
        around = np.empty(len(numbers), dtype=int)
        around[0::2] = text_lengths["query_beg"] + text_lengths["reply_beg"]
        around[1::2] = text_lengths["reply_end"]
        ends = np.cumsum(heights * widths + (rows - 1) * text_lengths["lines_sep"] + around)
        ends += text_lengths["preprompt"]
        return task["text" if reply else "input"], list(zip(ends[0::2].tolist(), ends[1::2].tolist(), strict=True))


class TrainingSamples:
    """Rows for a trainer: a map-style dataset of encoded views that can be pickled and forked.

    Row `epoch * len + index` is view `index` of that epoch. A row depends on its number alone, not on the process or
    the order of encoding.

    Attributes:
        dropped: puzzles with a view over `max_tokens` even with one demonstration; the caller prints them.
        puzzles: the other puzzles.
        views: their views.
    """

    def __init__(
        self, ds: ArcDataset, encoder: SampleEncoder, max_tokens: int, seed: int, epochs: int = 1, **view_options: Any
    ):
        """Drop the puzzles that are too long, and choose the augmentations of the others.

        Args:
            ds: the puzzles to train on.
            encoder: makes the ids.
            max_tokens: limit of a row, BOS included.
            seed: of the views.
            epochs: how many are planned, see `total_rows`. Rows of later epochs exist too.
            view_options: as in `Views`, from `tp` on.
        """
        turned = bool(view_options.get("tp")) or bool(view_options.get("rt"))
        long = {ArcDataset.get_base_key(key) for key in encoder.too_long(ds, ds.keys, max_tokens, turned)}
        self.dropped = [puzzle for puzzle in ds.challenge if puzzle in long]
        self.puzzles = ds.change_keys(k for k in ds.keys if ArcDataset.get_base_key(k) not in long) if long else ds
        self.encoder, self.max_tokens, self.epochs = encoder, max_tokens, epochs
        self.views = self.puzzles.views(seed, **view_options)
        self._surveys: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def total_rows(self) -> int:
        """Rows of all planned epochs."""
        return self.epochs * len(self)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.views)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of the first epoch."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row, see `SampleEncoder.encode`."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Many rows at once, for torch's DataLoader: many times faster than one by one.

        Raises:
            IndexError: a negative row, or there are no rows.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if not len(self) or (len(numbers) and numbers.min() < 0):
            raise IndexError(f"row {rows[0]} of {len(self):,} rows an epoch")
        keys = self.views.keys(numbers // len(self), numbers % len(self))
        return self.encoder.encode(self.puzzles, keys, self.max_tokens)

    def lengths(self, rows: int = 20_000, seed: int = 0) -> np.ndarray:
        """Tokens of a seeded random choice of the first epoch's rows (at most all of them), int64 (rows,)."""
        return self._survey(rows, seed)[0]

    def shortened(self, rows: int = 20_000, seed: int = 0) -> float:
        """Share of rows that lose demonstrations to fit, over the same choice as `lengths`."""
        lost = self._survey(rows, seed)[1]
        return float(lost.mean()) if len(lost) else 0.0

    def _survey(self, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        # Both callers share one survey: with merging digits it takes a while.
        if (rows, seed) not in self._surveys:
            chosen = np.sort(seeded_rng(seed, "survey").permutation(len(self))[:rows])
            batches = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))]
            for batch in np.array_split(chosen, len(chosen) // 1024 + 1) if len(chosen) else ():
                keys = self.views.keys(np.zeros_like(batch), batch)
                batches.append(self.encoder.lengths(self.puzzles, keys, self.max_tokens))
            lengths, shortened = zip(*batches, strict=True)
            self._surveys[rows, seed] = np.concatenate(lengths), np.concatenate(shortened)
        return self._surveys[rows, seed]
