"""The door `arc_loader`: light to import, and with the names that users import."""

import os
import re
import subprocess
import sys
import textwrap

import arc_loader
from tests.helpers import ROOT

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "matplotlib", "pandas")


def test_importing_the_door_is_quick_and_needs_numpy_only():
    code = (
        "import sys, time; start = time.process_time(); import arc_loader; "
        f"print(time.process_time() - start, *[name for name in {HEAVY} if name in sys.modules])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    seconds, *heavy = printed.split()  # of this process: other work on the machine does not count
    assert not heavy
    assert float(seconds) < 0.5


def test_every_name_of_the_door_is_there():
    assert all(getattr(arc_loader, name) is not None for name in arc_loader.__all__)
    assert {"ArcDataset", "Holdout", "find_reply_spans", "format_options", "seeded_rng", "view_keys"} <= {
        *arc_loader.__all__
    }


def test_the_example_of_the_door_runs(demo_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").symlink_to(demo_dataset)
    example = textwrap.dedent("\n".join(re.findall(r"^    .*|^$", arc_loader.__doc__, flags=re.MULTILINE)))
    names = {}
    exec(example.replace("examples=64, tasks=4", "examples=20, tasks=2"), names)
    assert names["correct"] is True and len(names["split"].seen.keys) == 20
