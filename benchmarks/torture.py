"""The three stages, killed again and again, end in the same files as an uninterrupted run.

    python benchmarks/torture.py --kills 100 --seed 0 --workers 2

Runs the three scripts on a tiny model once without interruption: the reference. Then runs chains of the same three
commands, each in a folder of its own, and kills them (SIGKILL, the whole process group) at random moments; the same
command is started again until the stage is done. New chains begin until the kills are used up. At the end:

- every file of a chain's seven folders is compared with the reference's. All are the same byte for byte but these: in
  manifest.json times, the chain's own path and the hashes of files that hold it are left out of the comparison; in
  adapter_config.json and README.md the path; of metrics.jsonl steps and losses are compared (each step once); of
  loss.png only that it is there.
- the commands are run once more: they must find everything whole and skip it.
- nothing else may lie in the output folder, and nothing in the folder for temporary files.
- a kill may cost no more steps than lie between two checkpoints.

Prints a summary and writes --results. Exit code 1 if anything is not so.

When a kill comes: start-up, with its imports, takes half of a run's time, and writing a checkpoint, saving, merging,
checking and renaming take fractions of a second each, in which everything can go wrong that can. Moments drawn evenly
over the time would almost all fall into imports and training. So a phase is drawn first, by WEIGHTS, among those that
the stage still has before it, and then a moment evenly over the time that this phase took in the reference, counted
from when the phase is seen to begin (so that a slow machine kills in the phase that was meant). What phase it fell into
in the end is read from the folders and the log after the kill.

The data are puzzles whose output is one cell, 1 or 2 at random: within a few steps the model answers with one of them
and is right half of the time, so stage 3 has rewards to learn from and its files differ from its parent's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from arc.runs.checkpoints import MARKER  # noqa: E402
from arc.runs.lock import LOCK_HOLDER  # noqa: E402

PREFIX = "Llama-3.2-1B"
STEPS = {"base_finetune.py": 24, "base_finetune_final.py": 24, "train_grpo.py": 8}
SAVE_STEPS = {"base_finetune.py": 4, "base_finetune_final.py": 3, "train_grpo.py": 2}
NAMES = {"base_finetune.py": "Base", "base_finetune_final.py": "Final", "train_grpo.py": "Final-RL"}
COMMON = (
    "--engine", "transformers", "--sizes", "6", "--perm", "false", "--max_seq_length", "320", "--holdout_examples", "8",
    "--lora_r", "8", "--gradient_accumulation_steps", "1", "--gradient_checkpointing", "false", "--logging_steps", "1",
    "--eval_steps", "0",
)  # fmt: skip
LEARN = ("--learning_rate", "5e-3", "--embedding_learning_rate", "5e-3", "--per_device_train_batch_size", "8")
FLAGS = {
    "base_finetune.py": (*COMMON, *LEARN),
    "base_finetune_final.py": (*COMMON, *LEARN),
    "train_grpo.py": (
        *COMMON, "--learning_rate", "1e-3", "--per_device_train_batch_size", "16", "--num_generations", "8"
    ),
}  # fmt: skip
# Chances of the phases that a kill is aimed at. Where a run writes, it can be hurt: most kills go there, and to the
# training, which every later step depends on.
WEIGHTS = {"start-up": 0.15, "training": 0.25, "checkpoint": 0.2, "saving": 0.1, "merging": 0.15}
WEIGHTS |= {"renaming": 0.1, "after": 0.05}
LET_THROUGH = 0.5  # share of the starts with only the merge left that are not killed: most kills are for what is before
RENAMING_S = 0.03  # to write the table of files, flush all of them and rename the folder
PHASES = (
    "start-up", "preparing the base", "training", "checkpoint", "saving", "merging", "checking the merge", "renaming",
    "after",
)  # fmt: skip
PATH_FILES = ("adapter_config.json", "README.md", "metrics.jsonl", "loss.png")  # differ by path or by times
TIMES = ("made", "mtime_ns", "seconds")  # of a manifest
POLL_S = 0.003
LIMIT_S = 900  # of one attempt: more is a hang


# ---------------------------------------------------------------------------------------------------------------------
# What a running stage shows


@dataclass
class Attempt:
    """One start of a stage's command: where it writes, and how to see how far it is."""

    script: str
    output: Path
    log: Path
    found: dict[Path, tuple[int, int]] = field(default_factory=dict)  # unfinished folders of earlier attempts
    begun: set[str] = field(default_factory=set)  # checkpoints that were seen

    def __post_init__(self) -> None:
        """Note what an earlier attempt has left, so that it is not taken for this one's."""
        self.checkpoints = self.output / f"{PREFIX}-{NAMES[self.script]}-checkpoints"
        self.lora = self.output / f"{PREFIX}-{NAMES[self.script]}-lora"
        self.merged = self.output / f"{PREFIX}-{NAMES[self.script]}-merged"
        self.found = {path: _identity(path) for path in self._folders()}
        self.trained_before = self.lora.is_dir()

    def _folders(self) -> list[Path]:
        return [*self.output.glob("*.incomplete"), *self.checkpoints.glob("*checkpoint-*")]

    def is_new(self, path: Path) -> bool:
        """Whether a folder is there that this attempt has made or made anew."""
        return path.is_dir() and self.found.get(path) != _identity(path)

    def printed(self) -> str:
        """The log so far."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(encoding="utf-8", errors="replace")
        return ""

    def unfinished(self, folder: Path) -> bool:
        """Whether this attempt is writing a folder."""
        return self.is_new(folder.with_name(folder.name + ".incomplete"))

    def new_checkpoints(self) -> list[Path]:
        """Checkpoints, whole or not, that this attempt has made."""
        return [path for path in self.checkpoints.glob("*checkpoint-*") if self.is_new(path)]

    def has_begun(self, phase: str, nth: int = 1) -> bool:
        """Whether a phase that kills are aimed at can be seen to have begun; of checkpoints the nth."""
        if phase == "start-up":
            return True
        if phase == "training":
            return "'loss':" in self.printed()
        if phase == "checkpoint":
            self.begun |= {path.name for path in self.new_checkpoints()}
            return len(self.begun) >= nth
        if phase == "saving":
            return self.unfinished(self.lora) or self.lora.is_dir()
        if phase == "renaming":
            return any(self.is_new(path) and is_sealed(path) for path in self.output.glob("*.incomplete"))
        if phase == "merging":
            printed = self.printed() if self.lora.is_dir() else ""
            return f"saved {self.lora}" in printed or "training skipped" in printed
        return self.merged.is_dir()

    def phase(self) -> str:
        """Where a killed attempt was, by what it left."""
        printed = self.printed()
        if self.merged.is_dir():
            return "after"
        for folder, doing in ((self.merged, "merging"), (self.lora, "saving")):
            beside = folder.with_name(folder.name + ".incomplete")
            if self.is_new(beside):
                if is_sealed(beside):
                    return "renaming"
                return "checking the merge" if doing == "merging" and any(beside.glob("*.safetensors")) else doing
        if self.lora.is_dir():
            return "merging" if "training skipped" in printed or f"saved {self.lora}" in printed else "start-up"
        preparing = self.output / f"{PREFIX}-prepared.incomplete"
        if self.is_new(preparing):
            return "renaming" if is_sealed(preparing) else "preparing the base"
        if any(not (path / MARKER).is_file() for path in self.new_checkpoints()):
            return "checkpoint"
        if re.search(r"^trained \d+ steps", printed, re.MULTILINE):
            return "saving"
        return "training" if "'loss':" in printed else "start-up"

    def first_step(self) -> int | None:
        """The step of the checkpoint that this attempt has continued from, 0 for none; None if it did not get there."""
        printed = self.printed()
        continued = re.search(r"continuing from \S*checkpoint-(\d+)", printed)
        if continued:
            return int(continued[1])
        return 0 if "'loss':" in printed else None

    def steps_done(self) -> int | None:
        """The last step that this attempt has done; None if it did not get to training."""
        first = self.first_step()
        if first is None:
            return None
        steps = [first + self.printed().count("'loss':")]
        if "'loss':" in self.printed():  # the file is ahead of the log, but still an earlier attempt's before that
            steps += [record["step"] for record in read_metrics(self.checkpoints / "metrics.jsonl")]
        return max(steps)


def is_sealed(folder: Path) -> bool:
    """Whether an unfinished artifact has the table of its files: next it is flushed and renamed."""
    return '"files"' in _text(folder / "manifest.json")


def _identity(path: Path) -> tuple[int, int]:
    with contextlib.suppress(FileNotFoundError):
        state = path.stat()
        return state.st_ino, state.st_ctime_ns
    return 0, 0


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line that is half written is passed over."""
    records = []
    for line in _text(path).splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Running and killing


def environment(temporary: Path) -> dict[str, str]:
    """Variables of a script: one thread, no network, its log as it goes, a folder of its own for temporary files."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    others = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**one_thread, **others, "TMPDIR": str(temporary), "ARC_LOADER_CACHE": "off"}


def start(script: str, flags: Sequence[str], log: Path, temporary: Path) -> subprocess.Popen[bytes]:
    """Start a script in a process group of its own, on one thread."""
    temporary.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment(temporary)},
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def survivors(output: Path) -> list[int]:
    """Processes, in whatever group, whose command names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(output).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


@dataclass
class Plan:
    """When an attempt is killed: `delay` seconds after `phase` is seen to begin, of checkpoints the `nth`."""

    phase: str
    delay: float
    nth: int = 1


def draw_plan(rng: np.random.Generator, durations: dict[str, float], trained: bool) -> Plan:
    """Draw a phase among those that are left, and a moment in it.

    Args:
        rng: of this chain.
        durations: seconds of each phase in the reference.
        trained: whether the adapter is there, so that only its merge is left.
    """
    left = [p for p in WEIGHTS if not trained or p in ("start-up", "merging", "renaming", "after")]
    chances = np.array([WEIGHTS[p] for p in left])
    phase = left[rng.choice(len(left), p=chances / chances.sum())]
    return Plan(phase, float(rng.uniform(0, 1) * durations[phase]), int(rng.integers(1, 4)))


class Kills:
    """How many kills are left, shared by the workers."""

    def __init__(self, count: int):
        """See the class."""
        self.left, self.lock = count, threading.Lock()

    def take(self) -> bool:
        """Take one, if there is one."""
        with self.lock:
            taken = self.left > 0
            self.left -= taken
            return taken

    def give_back(self) -> None:
        """An attempt ended before its kill came."""
        with self.lock:
            self.left += 1

    def any_left(self) -> bool:
        """Whether a new chain has anything to be killed with."""
        return self.left > 0


@dataclass
class Chain:
    """One run of the three stages and what happened to it."""

    number: int
    folder: Path
    inputs: Path
    scripts: Sequence[str]
    kills: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    problems: list[str] = field(default_factory=list)
    artifacts: dict[str, bool] = field(default_factory=dict)  # whether each folder is the reference's

    @property
    def output(self) -> Path:
        """Folder of the artifacts."""
        return self.folder / "output"

    def flags(self, script: str) -> list[str]:
        """The command's flags: the same for every attempt."""
        flags = [*FLAGS[script], "--dataset_dir", str(self.inputs / "dataset"), "--output_dir", str(self.output)]
        if script == "base_finetune.py":
            flags += ["--base_model", str(self.inputs / "base")]
        return [*flags, "--max_steps", str(STEPS[script]), "--save_steps", str(SAVE_STEPS[script])]

    def attempt(self, script: str, plan: Plan | None, watch: Callable[[Attempt, float], None] | None = None) -> str:
        """Start a stage once; kill it as planned.

        Args:
            script: the stage.
            plan: when to kill it; None: never.
            watch: called again and again with the attempt and its seconds.

        Returns:
            "done", "killed" or "failed".
        """
        self.starts += 1
        log = self.folder / "logs" / f"{self.starts:03d}-{script}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        attempt = Attempt(script, self.output, log)
        process, begin = start(script, self.flags(script), log, self.folder / "tmp"), time.perf_counter()
        seen: float | None = None
        try:
            while process.poll() is None:
                now = time.perf_counter()
                if watch:
                    watch(attempt, now - begin)
                if plan and seen is None and attempt.has_begun(plan.phase, plan.nth):
                    seen = now
                if seen is not None and now - seen >= plan.delay:
                    kill(process)
                    if process.returncode != -signal.SIGKILL:  # it ended by itself in this very moment
                        break
                    self._note_kill(attempt, plan, now - begin)
                    return "killed"
                if now - begin > LIMIT_S:
                    self.problems.append(f"{script} was not done after {LIMIT_S} s: {log}")
                    return "failed"
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                kill(process)
        self._note_start(attempt)
        if process.returncode:
            self.problems.append(f"{script} ended with {process.returncode}: {attempt.printed()[-1500:]}")
            return "failed"
        return "done"

    def _note_start(self, attempt: Attempt) -> None:
        # What the last kill in this stage's training has cost shows when a later attempt says where it continues.
        first = STEPS[attempt.script] if attempt.trained_before else attempt.first_step()
        for record in self.kills:
            if record["script"] == attempt.script and record["steps_lost"] is None and first is not None:
                record["steps_lost"] = max(0, record["steps_done"] - first)
                if record["steps_lost"] > SAVE_STEPS[attempt.script]:
                    self.problems.append(f"a kill cost {record['steps_lost']} steps: {record}")

    def _note_kill(self, attempt: Attempt, plan: Plan, seconds: float) -> None:
        self._note_start(attempt)
        done = attempt.steps_done()
        record = {
            "chain": self.number,
            "script": attempt.script,
            "phase": attempt.phase(),
            "aimed_at": plan.phase,
            "seconds": round(seconds, 3),
            "steps_done": done,
            "steps_lost": 0 if done is None or attempt.lora.is_dir() else None,
        }
        self.kills.append(record)
        until = time.perf_counter() + 5  # the system needs a moment to end them
        while (escaped := survivors(self.output)) and time.perf_counter() < until:
            time.sleep(0.05)
        if escaped:
            self.problems.append(f"processes {escaped} of {attempt.script} outlived the kill of their group")

    def run(self, kills: Kills, rng: np.random.Generator, durations: dict[str, dict[str, float]]) -> bool:
        """Run the three stages to their end, killed while there are kills left; returns whether they got there."""
        for script in self.scripts:
            result = "killed"
            while result == "killed":
                plan = None
                trained = (self.output / f"{PREFIX}-{NAMES[script]}-lora").is_dir()
                if not (trained and rng.random() < LET_THROUGH) and kills.take():
                    plan = draw_plan(rng, durations[script], trained)
                result = self.attempt(script, plan)
                if plan and result != "killed":
                    kills.give_back()
            if result == "failed":
                return False
        return True

    def run_again(self) -> None:
        """Everything is there: each command must find it whole and skip it."""
        for script in self.scripts:
            if self.attempt(script, None) == "done":
                printed = (self.folder / "logs" / f"{self.starts:03d}-{script}.log").read_text(encoding="utf-8")
                if "training skipped" not in printed or "merge skipped" not in printed:
                    self.problems.append(f"{script}, run again, did not skip what is there: {printed[-1500:]}")


def run_reference(chain: Chain) -> dict[str, dict[str, float]]:
    """Run the stages without a kill; returns the seconds of each stage's phases."""
    durations = {}
    for script in chain.scripts:
        timeline = Timeline()
        if chain.attempt(script, None, timeline) != "done":
            sys.exit(f"the reference failed: {chain.problems}")
        order = ["start-up", "training", "saving", "merging", "after"]
        began = timeline.began
        ends = [*(began[phase] for phase in order[1:]), timeline.last]
        durations[script] = {p: end - began[p] for p, end in zip(order, ends, strict=True)}
        # And a moment more, in which the oldest one is removed.
        longest = max((end - begin for begin, end in timeline.checkpoints.values()), default=0)
        durations[script]["checkpoint"] = longest + 0.01
        durations[script]["renaming"] = RENAMING_S
    return durations


class Timeline:
    """When the phases of an attempt are seen to begin, and from when to when each checkpoint is unfinished."""

    def __init__(self) -> None:
        """See the class."""
        self.began: dict[str, float] = {}
        self.checkpoints: dict[str, tuple[float, float]] = {}
        self.last = 0.0

    def __call__(self, attempt: Attempt, seconds: float) -> None:
        """Look at an attempt that runs for these seconds."""
        self.last = seconds
        for phase in WEIGHTS:
            if phase not in self.began and attempt.has_begun(phase):
                self.began[phase] = seconds
        for path in attempt.new_checkpoints():
            if path.name not in self.checkpoints:
                self.checkpoints[path.name] = (seconds, seconds)
                self.writing = path.name
            if path.name == self.writing and not (path / MARKER).is_file():
                self.checkpoints[path.name] = (self.checkpoints[path.name][0], seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def plain(value: Any, root: Path) -> Any:
    """A manifest's value without times, paths of the chain, and what depends on these."""
    if isinstance(value, dict):
        kept = {name: plain(entry, root) for name, entry in value.items() if name not in TIMES}
        for name in kept:
            if name.endswith(PATH_FILES) and isinstance(kept[name], dict):
                kept[name] = "a file that holds paths or times"
            if name.endswith("-lora") and isinstance(kept[name], str):  # a fingerprint, which its paths are part of
                kept[name] = "an adapter"
        return kept
    if isinstance(value, list):
        return [plain(entry, root) for entry in value]
    return value.replace(str(root), "ROOT") if isinstance(value, str) else value


def same_file(one: Path, other: Path, roots: tuple[Path, Path]) -> bool:
    """Whether a file is that of the reference, in the sense of this module's docstring."""
    if one.name == "loss.png":
        return one.stat().st_size > 0
    if one.name == "manifest.json":
        return plain(json.loads(_text(one)), roots[0]) == plain(json.loads(_text(other)), roots[1])
    if one.name in ("adapter_config.json", "README.md"):
        return _text(one).replace(str(roots[0]), "ROOT") == _text(other).replace(str(roots[1]), "ROOT")
    if one.name == "metrics.jsonl":
        losses = [[(r["step"], r["loss"]) for r in read_metrics(path) if "loss" in r] for path in (one, other)]
        return losses[0] == losses[1] and len(dict(losses[0])) == len(losses[0]) > 0
    return one.read_bytes() == other.read_bytes()


def folders_of(scripts: Sequence[str]) -> list[str]:
    """Last parts of the artifacts' names."""
    return ["prepared", *(f"{NAMES[script]}-{kind}" for script in scripts for kind in ("lora", "merged"))]


def compare(chain: Chain, reference: Chain) -> None:
    """Note which artifacts of a finished chain are the reference's, and what lies about that should not."""
    for name in folders_of(chain.scripts):
        folder, expected = chain.output / f"{PREFIX}-{name}", reference.output / f"{PREFIX}-{name}"
        files, expected_files = (
            {p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (folder, expected)
        )
        roots = chain.folder, reference.folder
        different = sorted(files ^ expected_files) + sorted(
            file for file in files & expected_files if not same_file(folder / file, expected / file, roots)
        )
        chain.artifacts[name] = not different and bool(files)
        if different or not files:
            chain.problems.append(f"{folder} differs from the reference: {', '.join(different) or 'it is empty'}")
    # The note of who holds the lock stays where its writer was killed, as the lock's own file does; the next one writes
    # it anew, and nobody reads it unless the lock is held.
    usual = {path.name for path in reference.output.iterdir()} | {LOCK_HOLDER}
    left = [path for path in chain.output.iterdir() if path.name not in usual]
    left += [path for path in chain.output.rglob("*") if path.name.endswith((".incomplete", ".tmp", ".part"))]
    left += [path for path in chain.output.glob("*/*checkpoint-*") if path.is_dir() and not (path / MARKER).is_file()]
    usual = {path.name for path in (reference.folder / "tmp").iterdir()}  # torch's empty folder of compiled code
    left += [path for path in (chain.folder / "tmp").iterdir() if path.name not in usual]
    if left:
        chain.problems.append(f"left over: {', '.join(sorted({str(path) for path in left}))}")


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def make_inputs(folder: Path) -> None:
    """Write a tiny base and a dataset that can be solved by luck (see the module's docstring)."""
    command = [sys.executable, str(ROOT / "demo/make_base.py"), "--out", str(folder / "base")]
    subprocess.run([*command, "--hidden", "192", "--layers", "4"], check=True, stdout=subprocess.DEVNULL)
    (folder / "dataset").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for task in range(3):
        pairs = [{"input": [[int(rng.integers(3, 9))]], "output": [[int(rng.integers(1, 3))]]} for _ in range(300)]
        (folder / "dataset" / f"coin{task}.json").write_text(json.dumps(pairs), encoding="utf-8")


def processor() -> str:
    """The machine's processor, by name where Linux tells it."""
    found = re.search(r"^model name\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def summarise(chains: Sequence[Chain], seconds: float, durations: dict[str, dict[str, float]], workers: int) -> dict:
    """The figures of a run, for JSON."""
    from arc.runs.artifacts import versions

    folders = folders_of(chains[0].scripts)
    killed = [record for chain in chains for record in chain.kills]
    lost = [record["steps_lost"] for record in killed if record["steps_lost"] is not None]
    phases = Counter(record["phase"] for record in killed)
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "seconds": round(seconds),
        "workers": workers,
        "kills": len(killed),
        "starts": sum(chain.starts for chain in chains),
        "chains": len(chains),
        "kills_by_phase": {phase: phases[phase] for phase in PHASES},
        "kills_by_stage": dict(Counter(record["script"] for record in killed)),
        "steps_lost": {
            "most": max(lost, default=0),
            "mean": round(float(np.mean(lost)), 2) if lost else 0.0,
            "between_checkpoints": SAVE_STEPS,
        },
        "bit_identical": {name: all(chain.artifacts.get(name, False) for chain in chains) for name in folders},
        "problems": [f"chain {chain.number}: {problem}" for chain in chains for problem in chain.problems],
        "reference_seconds": {s: {p: round(t, 3) for p, t in d.items()} for s, d in durations.items()},
        "rows": killed,
    }


def show(result: dict[str, Any]) -> None:
    """Print a run's figures as tables."""
    print(f"\n{result['machine']}; {result['seconds']} s with {result['workers']} workers")
    print(f"{result['kills']} kills in {result['chains']} chains, {result['starts']} starts of a stage\n")
    print("| killed in | times |\n| --- | --- |")
    for phase, count in result["kills_by_phase"].items():
        print(f"| {phase} | {count} |")
    lost = result["steps_lost"]
    print(f"\nsteps lost by a kill: {lost['mean']} on average, {lost['most']} at most")
    print("\n| folder | the same as without a kill |\n| --- | --- |")
    for name, same in result["bit_identical"].items():
        print(f"| {PREFIX}-{name} | {'yes' if same else 'NO'} |")
    print("\n" + ("\n".join(f"PROBLEM: {p}" for p in result["problems"]) or "no differences, nothing left over"))


def main() -> int:
    """Run the reference and the chains, compare, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--workers", type=int, default=2, help="chains side by side, one thread each (2)")
    parser.add_argument("--stages", type=int, default=3, choices=(1, 2, 3), help="how many of the stages to run (3)")
    parser.add_argument("--work_dir", type=Path, help="a new folder to work in, kept; default: a temporary one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "torture.json")
    args = parser.parse_args()
    if args.kills < 1 or args.workers < 1 or (args.work_dir and args.work_dir.exists()):
        print("error: expected at least one kill, one worker, and a --work_dir that is not there yet", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    work = (args.work_dir or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    make_inputs(work / "inputs")
    scripts = list(STEPS)[: args.stages]
    reference = Chain(0, work / "reference", work / "inputs", scripts)
    durations = run_reference(reference)
    seconds = sum(sum(d[p] for p in ("start-up", "training", "saving", "merging", "after")) for d in durations.values())
    print(f"{work}: reference done in {seconds:.0f} s", flush=True)
    compare(reference, reference)  # with itself: nothing left over there either
    kills, chains, taking = Kills(args.kills), [reference], threading.Lock()

    def work_on_chains() -> None:
        while True:
            with taking:
                if not kills.any_left():
                    return
                chain = Chain(len(chains), work / f"chain-{len(chains)}", work / "inputs", scripts)
                chains.append(chain)
            if chain.run(kills, np.random.default_rng((args.seed, chain.number)), durations):
                compare(chain, reference)
                chain.run_again()
            state = "; ".join(chain.problems) or "the same as the reference"
            print(f"chain {chain.number}: {len(chain.kills)} kills, {chain.starts} starts: {state}", flush=True)
            if not chain.problems:
                shutil.rmtree(chain.folder)

    with ThreadPoolExecutor(args.workers) as pool:
        for running in [pool.submit(work_on_chains) for _ in range(args.workers)]:
            running.result()
    result = summarise(chains[1:], time.perf_counter() - begin, durations, args.workers)
    result["problems"] += [f"reference: {problem}" for problem in reference.problems]
    show(result)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["problems"]:
        print(f"what is left of it: {work}")
    elif not args.work_dir:
        shutil.rmtree(work)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
