"""Score models side by side on puzzles that they were not trained on.

Reads   --models: folders of models (prepared base, -merged) or adapters (-lora), or hub names;
        --challenges (and --solutions) in the competition's format, or --dataset_dir: then the puzzles are those that
        the stages held out (give the same --holdout_... flags).
Writes  OUTPUT/results.json, report.html, submission-MODEL.json; and replies to OUTPUT/cache: a run that was interrupted
        goes on from there, and a run with more --views computes only the new ones.

On a CUDA box:  python evaluate_arc.py --models output/Llama-3.2-1B-Final-merged output/Llama-3.2-1B-Final-RL-merged
                    --dataset_dir dataset --output_dir evaluation
On a laptop:    python evaluate_arc.py --config demo/demo_evaluate.yaml --models demo/output/Llama-3.2-1B-Base-merged
                    --dataset_dir demo_dataset --output_dir demo/evaluation
"""

import math
from dataclasses import dataclass
from pathlib import Path

from arc.evaluation.models import find_models
from arc.evaluation.puzzles import load_puzzles
from arc.evaluation.replies import Replies
from arc.evaluation.results import evaluate, write_results
from arc.evaluation.selection import RULES
from arc.evaluation.tables import print_tables
from arc.runs import settings as checks
from arc.runs.lock import OutputLock
from arc.runs.processes import fail, is_main, wait_for_everyone
from arc.runs.settings import DataSettings, parse_settings, setting, user_errors
from arc.runs.troubles import machine_errors


@dataclass
class Settings(DataSettings):
    """Which models are evaluated on which puzzles, and how."""

    # What
    models: list[str] = setting([], "folders of models or adapters, or hub names: the columns, in this order")
    model_names: list[str] = setting([], "names of the columns; default: the folders' names")
    challenges: str | None = setting(None, "puzzles in the competition's format")
    solutions: str | None = setting(None, "their solutions; without them there are answers and no scores")
    dataset_dir: str | None = setting(  # type: ignore[assignment]  # the stages need one
        None,
        "folder of task files that the stages were trained on; what they held out is evaluated; with "
        "--challenges: only to find challenges that were trained on",
    )
    heldout: str = setting("all", "of --dataset_dir: examples (of trained tasks), tasks (whole ones) or all")
    puzzles: int | None = setting(None, "evaluate only this many puzzles, chosen by the seed")
    exclude_leaked: bool = setting(False, "leave out puzzles and test pairs that were trained on, up to symmetry")
    # How
    views: int = setting(16, "augmented views of each test input: 8 symmetries, colours and orders")
    keep_background: bool = setting(False, "colour permutations leave 0 unchanged")
    decoding: str = setting("search", "search: all replies of at least --min_prob; sample; or greedy: one a view")
    min_prob: float = setting(0.1, "lowest probability of a reply that the search finds")
    samples: int = setting(4, "samples of each view, with --decoding sample")
    temperature: float = setting(1.0, "temperature of the samples")
    selection: str = setting("product", "how the two guesses are chosen: " + ", ".join(RULES))
    seed: int = setting(42, "seed of views and samples")
    max_seq_length: int = setting(8192, "longest prompt and reply together; demonstrations are dropped to fit")
    max_new_tokens: int | None = setting(None, "longest reply; default: that of a grid of 30 x 30")
    batch_size: int | None = setting(None, "rows decoded at once; default: as many as the free memory allows")
    dtype: str = setting("auto", "bfloat16, float16, float32, or auto: what this machine has")
    load_in_4bit: bool | None = setting(None, "quantise; default: adapters as they were trained, models not")
    # Where
    output_dir: str = setting("evaluation", "folder of the results")
    cache_dir: str | None = setting(None, "folder of the cached replies; default: OUTPUT/cache")

    def problems(self) -> list[str]:
        """What is wrong with these settings, one line each."""
        optional = ("puzzles", "max_new_tokens", "batch_size")
        extra = bool(self.dataset_dir) or not self.extra_dataset_dirs
        good = {
            "models": (bool(self.models) and all(m.strip() for m in self.models), "one folder or hub name or more"),
            "challenges": (bool(self.challenges or self.dataset_dir), "a file, or else --dataset_dir"),
            "extra_dataset_dirs": (extra, "nothing, without --dataset_dir"),
            "solutions": (not self.solutions or bool(self.challenges), "nothing, without --challenges"),
            "heldout": (self.heldout in ("all", "examples", "tasks"), "all, examples or tasks"),
            "decoding": (self.decoding in ("search", "sample", "greedy"), "search, sample or greedy"),
            "selection": (self.selection in RULES, " or ".join(RULES)),
            "views": (self.views >= 1, checks.WHOLE_FROM_1),
            "samples": (self.samples >= 1, checks.WHOLE_FROM_1),
            "min_prob": (0.001 <= self.min_prob <= 1, "a probability from 0.001 to 1"),
            "temperature": (math.isfinite(self.temperature) and self.temperature > 0, "a number above 0"),
            "seed": (checks.is_seed(self.seed), checks.SEED),
            "max_seq_length": (self.max_seq_length >= 16, "a whole number from 16"),
            "output_dir": (checks.is_name(self.output_dir), "a name"),
            "cache_dir": (checks.is_name(self.cache_dir), "a name"),
            **{n: (getattr(self, n) is None or getattr(self, n) >= 1, checks.WHOLE_FROM_1) for n in optional},
        }
        return checks.failed_checks(self, good)


def main() -> None:
    """Evaluate, print the tables and write the results."""
    settings = parse_settings(Settings)
    with user_errors():
        models = find_models(settings.models, settings.model_names, settings.dtype, settings.load_in_4bit)
        replies = [Replies(model, settings) for model in models]
        puzzles = load_puzzles(settings)
        keys, ids = puzzles.dataset.keys, puzzles.dataset.challenge
        print(f"{puzzles.source}: {len(keys):,} test inputs of {len(ids):,} puzzles")
        lock = OutputLock(Path(settings.output_dir), "evaluate_arc.py")
        if is_main():
            lock.acquire()
        wait_for_everyone()
    try:
        with machine_errors("evaluating", {}, folder=settings.output_dir):
            results = evaluate(replies, puzzles, settings)
            print_tables(results)
            for path in write_results(results, puzzles.dataset, settings.output_dir):
                print(path)
    except KeyboardInterrupt:
        fail("interrupted: the replies so far are kept; the same command goes on from there", 130)
    finally:
        lock.release()


if __name__ == "__main__":
    main()
