"""Does it learn? A small Llama through all three stages and their evaluation, on any dataset folder: `make learn`.

    python benchmarks/learn.py --dataset_dir dataset --output_dir learn/output
    python benchmarks/learn.py --dataset_dir dataset --output_dir learn/output --pieces seeds ablations

Runs the same scripts as everybody does, each as a process of its own, with the settings of --configs (learn/*.yaml):

    base        demo/make_base.py: a small Llama, pretrained on generated puzzles (base.yaml); and demo/make_dataset.py:
                puzzles that stage 2 trains on besides: with random rules (programs.yaml, if there is one), and of
                the dataset with changed outputs (changed.yaml, if there is one)
    stage1      base_finetune.py (stage1.yaml)
    stage2      base_finetune_final.py (stage2.yaml)
    stage3      train_grpo.py (stage3.yaml)
    greedy      evaluate_arc.py: one greedy guess of each model (evaluate_greedy.yaml)
    search      evaluate_arc.py: two guesses from 16 views (evaluate_search.yaml)
    seeds       stage 3 again from the same merge, with the seeds after its own, and their greedy guesses
    ablations   short second rounds from stage 1's merge, one thing changed in each (ablation.yaml)

Held out are puzzles of the tasks that are trained on (`seen`) and whole tasks (`unseen`), the same in all; which tasks
is written down in split.json. What is done already is not done again, and an interrupted piece goes on: with
--time_limit, calls of a few minutes each can be chained (exit code 3: run the same command again). --together 3 runs
three at a time of what does not need each other, on a GPU that one of them does not fill: stage 3, its other seeds,
ablations, and evaluations of the models that are there. --gpus 4 spreads them over four GPUs, and trains the first
ablations beside stage 2, which keeps a GPU for itself.

Writes --results after each evaluation, every number from a results.json of evaluate_arc.py, and curves beside it.
"rows" of each model and set: exact_1 (n test inputs, one greedy guess), exact_2 (n_2 of them, two guesses from 16
views), with 95% intervals ci_1 and ci_2; ci_1_tasks, where tasks are resampled; prob_truth, how probable solutions
are. "grpo_gain": stage 3 minus stage 2, paired, in points, mean over the seeds, and of prob_truth as "sampled"; puzzles
that stage 3 chose its adapter by are left out. Logs: OUTPUT/logs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from arc.evaluation.scores import mean_interval  # noqa: E402

PIECES = ("base", "stage1", "stage2", "stage3", "greedy", "search", "seeds", "ablations")
MAIN_PIECES = PIECES[:6]
PREFIX = "Llama-3.2-1B"
# Each stage: its script, the name of what it writes, the stage that it starts from.
STAGES = {
    "stage1": ("base_finetune.py", "Base", None),
    "stage2": ("base_finetune_final.py", "Final", "Base"),
    "stage3": ("train_grpo.py", "Final-RL", "Final"),
}
MODELS = {
    "base": f"{PREFIX}-prepared", "stage1": f"{PREFIX}-Base-merged", "stage2": f"{PREFIX}-Final-merged",
    "stage3": f"{PREFIX}-Final-RL-merged",
}  # fmt: skip
# Generated puzzles that stages train on besides, by their settings' names. In trials of stage 3 with prompts of the
# course alone unseen tasks lost a point, with programs among them none (benchmarks/README.md).
BESIDES = {"stage2": ("programs", "changed"), "stage3": ("programs", "changed")}
SETS = {"seen": "examples", "unseen": "tasks"}  # and what evaluate_arc.py calls them
SPLIT = ("sizes", "grid_sizes", "dataset_seed", "holdout_examples", "holdout_tasks", "holdout_seed")
FOUR_BIT = ["--load_in_4bit", "true", "--compile_layers", "false"]  # layers that dequantise are not compiled
# What is changed in each ablation, the flags that change it, and whether it is stage 2's script or stage 1's.
ABLATIONS: dict[str, tuple[str, list[str], str]] = {
    "masked": ("nothing: stage 2, shortened and without extra puzzles", [], "stage2"),
    "all-tokens": ("all tokens are learned again, as in stage 1", [], "stage1"),
    "embedding-1e-5": ("embedding_learning_rate 1e-5", ["--embedding_learning_rate", "1e-5"], "stage2"),
    "r-64": ("lora_r 64", ["--lora_r", "64"], "stage2"),
    "4bit-quantised": (
        "4-bit base, merged onto it as quantised", [*FOUR_BIT, "--merge_base", "quantised"], "stage2",
    ),
    "4bit-original": (
        "4-bit base, merged onto its 16-bit weights", [*FOUR_BIT, "--merge_base", "original"], "stage2",
    ),
}  # fmt: skip
NOT_DONE = 3  # exit code: the time limit came first
GRACE = 60.0  # seconds for a script to save what it has after it was told to stop
WHOLE_GPU = 1000  # jobs for which one counts that is to have a GPU for itself
LEAST = 20.0  # seconds without which nothing is begun


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: of the job, and of its log.
        command: the script and its flags.
        inputs: files that decide what comes out of it: its settings, and manifests of models that it starts from.
        result: a file that is there when it is done.
        whole: seconds that it needs at one go; 0: it goes on where it was stopped.
        prepare: called before the command.
        alone: it fills a GPU: of several it gets one for itself.
    """

    name: str
    command: list[str]
    inputs: list[Path]
    result: Path
    whole: float = 0.0
    prepare: Callable[[], None] | None = None
    alone: bool = False

    def identity(self) -> str:
        """A hash of the command and of what it reads."""
        parts = [json.dumps(self.command)]
        parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.inputs]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def shown(self) -> str:
        """The command as a user types it."""
        script, *flags = self.command
        return shlex.join(["python", Path(os.path.relpath(script, ROOT)).as_posix(), *flags])


class Chain:
    """The jobs of a run, and what is known of those that were begun.

    Args:
        args: the command's flags.

    Attributes:
        state: of each job by its name {"identity", "command", "seconds": of each start, "done"}; kept in jobs.json of
            the output folder.
    """

    def __init__(self, args: argparse.Namespace):
        """See the class."""
        self.args = args
        self.output, self.configs = Path(args.output_dir), Path(args.configs)
        self.path = self.output / "jobs.json"
        self.running: list[subprocess.Popen] = []
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.on_gpu = [0] * args.gpus  # jobs that run on each
        self.placed: dict[str, int] = {}  # the GPUs of jobs that have not begun
        self.state: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))

    def config(self, name: str) -> Path:
        """A file of settings."""
        return self.configs / f"{name}.yaml"

    def is_done(self, job: Job) -> bool:
        """Whether the job's result is there and was made by this command from what is there now."""
        kept = self.state.get(job.name, {})
        return bool(kept.get("done")) and job.result.exists() and kept["identity"] == job.identity()

    def note(self, job: Job, seconds: float, done: bool) -> None:
        """Keep how long a start of the job took and whether it came to its end."""
        identity = job.identity()
        with self.lock:
            kept = self.state.get(job.name, {})
            if kept.get("done") and not done and job.result.exists():
                return  # refused, such as with other settings: what there is was made as it was noted before
            before = kept.get("seconds", []) if kept.get("identity") == identity else []
            self.state[job.name] = {
                "identity": identity, "command": job.shown(), "seconds": [*before, round(seconds, 1)], "done": done,
            }  # fmt: skip
            write_json(self.path, self.state)

    @contextmanager
    def gpu_for(self, job: Job) -> Iterator[dict[str, str] | None]:
        """The environment of a job's script: of several GPUs (those of CUDA_VISIBLE_DEVICES) it sees the least busy."""
        if len(self.on_gpu) == 1:
            yield None
            return
        gpu = self.placed.pop(job.name, None)
        if gpu is None:
            gpu = self.place(job)
        names = visible_gpus() or [str(number) for number in range(len(self.on_gpu))]
        try:
            yield {**os.environ, "CUDA_VISIBLE_DEVICES": names[gpu]}
        finally:
            with self.lock:
                self.on_gpu[gpu] -= WHOLE_GPU if job.alone else 1

    def place(self, job: Job) -> int:
        """Choose the GPU on which fewest jobs run, and count the job there."""
        with self.lock:
            gpu = self.on_gpu.index(min(self.on_gpu))
            self.on_gpu[gpu] += WHOLE_GPU if job.alone else 1
        return gpu

    # -- the jobs

    def jobs(self, pieces: Sequence[str]) -> Iterator[list[Job]]:
        """The jobs of some pieces in order; those of a part need nothing of each other, but the parts before it."""
        if "base" in pieces:
            yield [self.base(), *self.extras()]
        for piece in ("stage1", "stage2"):
            if piece in pieces:
                beside = piece == "stage2" and "ablations" in pieces and min(self.args.gpus, self.args.together) > 1
                yield [self.stage(piece), *(self.ablations()[0] if beside else [])]
        if self.args.together > 1:
            yield from self.side_by_side(pieces)
            return
        if "stage3" in pieces:
            yield [self.stage("stage3")]
        for kind in ("greedy", "search"):
            if kind in pieces:
                yield self.evaluations(kind, kind, self.models())
        if "seeds" in pieces:
            yield self.seeds()
            yield self.evaluations("seeds", "greedy", self.seed_models())
        if "ablations" in pieces:
            yield from self.ablations()
            yield self.ablation_evaluations()

    def side_by_side(self, pieces: Sequence[str]) -> Iterator[list[Job]]:
        """What follows stage 2 in as few parts as it can: trainings beside evaluations of the models that are there."""
        trainings = [self.stage("stage3")] if "stage3" in pieces else []
        trainings += self.seeds() if "seeds" in pieces else []
        first, then = self.ablations() if "ablations" in pieces else ([], [])
        if len(trainings) == 1 and not then:  # its one model is as quickly evaluated with all
            yield [*trainings, *first, *(job for job in self.singles(pieces) if "-stage3-" not in job.name)]
        else:
            yield [*trainings, *first, *self.singles(pieces)]
            yield [*then, *self.singles(pieces)]
            yield self.singles(pieces)
        evaluations = self.evaluations("greedy", "greedy", self.models()) if "greedy" in pieces else []
        evaluations += self.evaluations("search", "search", self.models()) if "search" in pieces else []
        evaluations += self.evaluations("seeds", "greedy", self.seed_models()) if "seeds" in pieces else []
        evaluations += self.ablation_evaluations() if "ablations" in pieces else []
        yield evaluations

    def singles(self, pieces: Sequence[str]) -> list[Job]:
        """Evaluations of each model that is there by itself, to run several at once.

        What they find is kept in the cache that all share, so that those of all models side by side take seconds.
        """
        greedy = self.models() if "greedy" in pieces else {}
        greedy |= self.seed_models() if "seeds" in pieces else {}
        greedy |= self.ablation_models() if "ablations" in pieces else {}
        asked = {"greedy": greedy, "search": self.models() if "search" in pieces else {}}
        return [
            job
            for kind, models in asked.items()
            for name, model in models.items()
            for job in self.single(kind, name, model)
        ]

    def single(self, kind: str, name: str, model: Path) -> list[Job]:
        """Evaluations of one model by itself, on each set."""
        return self.evaluations(f"single-{kind}-{name}", kind, {name: model})

    def base(self) -> Job:
        """The base model."""
        config, folder = self.config("base"), self.output / "base"
        values = read_yaml(config)
        command = [str(ROOT / "demo" / "make_base.py"), "--out", str(folder), *as_flags(values)]
        # A pretraining that is stopped begins anew. Compiling comes on top of its seconds.
        whole = float(values.get("pretrain_seconds", 0))
        return Job("base", command, [config], folder / "make_base.json", whole=1.2 * whole + 75 if whole else 0.0)

    def extras(self) -> list[Job]:
        """The puzzles that stage 2 trains on besides, a folder of each kind that there are settings for."""
        jobs = []
        for name, flags in {"programs": [], "changed": ["--changed_from", str(self.args.dataset_dir)]}.items():
            config, folder = self.config(name), self.output / name
            if config.is_file():
                values = as_flags(read_yaml(config))
                command = [str(ROOT / "demo" / "make_dataset.py"), "--out", str(folder), *flags, *values]
                jobs.append(Job(name, command, [config], folder / "rules.txt", whole=150.0))  # each is made at one go
        return jobs

    def stage(self, name: str) -> Job:
        """A stage of the main run."""
        script, artifact, parent = STAGES[name]
        flags, needed = [], [self.output / "base" / "make_base.json"]
        if parent is None:
            flags = ["--base_model", str(self.output / "base")]
        else:
            needed = [self.manifest(self.output / f"{PREFIX}-{parent}-merged")]
        more, listings = self.besides(name)
        flags, needed = [*flags, *more], [*needed, *listings]
        job = self.training(name, script, self.config(name), needed, self.output, artifact, flags)
        return replace(job, alone=name != "stage3")

    def besides(self, stage: str) -> tuple[list[str], list[Path]]:
        """The flags by which a stage trains on generated puzzles besides, and the lists of what is in their folders."""
        listings = [made.result for made in self.extras() if made.name in BESIDES.get(stage, ())]
        return ["--extra_dataset_dirs", *(str(path.parent) for path in listings)] if listings else [], listings

    def training(
        self, name: str, script: str, config: Path, needed: list[Path], output: Path, artifact: str, flags: list[str]
    ) -> Job:
        """A run of a stage's script; `needed` are files of what it starts from and trains on."""
        for path in needed:
            if not path.is_file():
                raise FileNotFoundError(f"{name} needs {path.parent}, which is not there: run the pieces before it")
        fixed = ["--config", str(config), "--dataset_dir", str(self.args.dataset_dir), "--output_dir", str(output)]
        result = self.manifest(output / f"{PREFIX}-{artifact}-merged")
        return Job(name, [str(ROOT / script), *fixed, *flags], [config, *needed], result)

    def models(self) -> dict[str, Path]:
        """The models of the main run that are there, by their names."""
        found = {name: self.output / folder for name, folder in MODELS.items()}
        return {name: folder for name, folder in found.items() if self.manifest(folder).is_file()}

    def seed_models(self) -> dict[str, Path]:
        """Stage 2, stage 3, and stage 3 with the other seeds, those that are there."""
        found = {name: folder for name, folder in self.models().items() if name in ("stage2", "stage3")}
        for seed in other_seeds(self):
            folder = self.output / f"seed{seed}" / MODELS["stage3"]
            if self.manifest(folder).is_file():
                found[f"stage3-seed{seed}"] = folder
        return found

    def ablation_models(self) -> dict[str, Path]:
        """Stage 1, which the ablations start from, and what has been made of it."""
        found = {name: folder for name, folder in self.models().items() if name == "stage1"}
        for name, (_, _, like) in ABLATIONS.items():
            folder = self.output / "ablations" / name / MODELS[like]
            if self.manifest(folder).is_file():
                found[name] = folder
        return found

    def first_seed(self) -> int:
        """Stage 3's own seed."""
        return int(settings_of("stage3", self.config("stage3"), self.args.dataset_dir).seed)

    def evaluations(self, name: str, kind: str, models: Mapping[str, Path], flags: Sequence[str] = ()) -> list[Job]:
        """One evaluation of several models on each set; replies are shared by all evaluations."""
        if not models:
            raise FileNotFoundError(f"{name}: no model in {self.output} to evaluate: run the pieces before it")
        config, folder = self.config(f"evaluate_{kind}"), self.output / "evaluation"
        jobs = []
        for which in self.args.sets:
            output = folder / f"{name}-{which}"
            command = [
                str(ROOT / "evaluate_arc.py"), "--config", str(config), "--dataset_dir", str(self.args.dataset_dir),
                "--heldout", SETS[which], "--models", *map(str, models.values()), "--model_names", *models,
                "--output_dir", str(output), "--cache_dir", str(folder / "cache"), *flags,
            ]  # fmt: skip
            manifests = [self.manifest(model) for model in models.values()]
            jobs.append(Job(f"{name}-{which}", command, [config, *manifests], output / "results.json"))
        return jobs

    def seeds(self) -> list[Job]:
        """Stage 3 with other seeds from the same merge."""
        script, artifact, parent = STAGES["stage3"]
        merged = self.output / f"{PREFIX}-{parent}-merged"
        more, listings = self.besides("stage3")
        return [
            self.training(
                f"seed{seed}", script, self.config("stage3"), [self.manifest(merged), *listings],
                self.output / f"seed{seed}", artifact, ["--base_model", str(merged), "--seed", str(seed), *more],
            )
            for seed in other_seeds(self)
        ]  # fmt: skip

    def ablations(self) -> tuple[list[Job], list[Job]]:
        """Short second rounds from stage 1's merge; the last needs an adapter of one before it."""
        merged, folder = self.output / MODELS["stage1"], self.output / "ablations"
        first, then = [], []
        for name in self.args.ablations:
            _, flags, like = ABLATIONS[name]
            script, artifact, _ = STAGES[like]
            job = self.training(
                f"ablation-{name}", script, self.config("ablation"), [self.manifest(merged)], folder / name, artifact,
                ["--base_model", str(merged), *flags],
            )  # fmt: skip
            if name == "4bit-original":  # the same adapter, merged in another way
                then.append(replace(job, prepare=self.copy_the_quantised_adapter))
            else:
                first.append(job)
        return first, then

    def ablation_evaluations(self) -> list[Job]:
        """All ablations on the same puzzles, and those of 4 bits as a next stage would load them."""
        evaluations = self.evaluations("ablations", "greedy", self.ablation_models())
        four_bit = {name: model for name, model in self.ablation_models().items() if name.startswith("4bit")}
        if four_bit:
            evaluations += self.evaluations("ablations-4bit", "greedy", four_bit, ["--load_in_4bit", "true"])
        return evaluations

    def copy_the_quantised_adapter(self) -> None:
        """Give 4bit-original the adapter of 4bit-quantised, if that is there and it has none."""
        folder = self.output / "ablations"
        adapter = f"{PREFIX}-Final-lora"
        there, to = folder / "4bit-quantised" / adapter, folder / "4bit-original" / adapter
        if self.manifest(there).is_file() and not to.exists():
            beside = to.with_name(f"{adapter}.incomplete")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(there, beside)
            beside.rename(to)

    @staticmethod
    def manifest(folder: Path) -> Path:
        """The manifest of a model folder of the pipeline."""
        return folder / "manifest.json"


def run_job(job: Job, chain: Chain, deadline: float) -> int:
    """Run a job until it is done or the time is over.

    Args:
        job: what to run.
        chain: keeps what came of it.
        deadline: on the monotonic clock; math.inf: none.

    Returns:
        Its exit code; NOT_DONE where the time limit came first.
    """
    left = deadline - time.monotonic()
    if left < max(LEAST, job.whole):
        print(f"{job.name}: not begun, {left:.0f} s are left of --time_limit", flush=True)
        return NOT_DONE
    if job.prepare:
        job.prepare()
    log = chain.output / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{job.name}: {job.shown()}", flush=True)
    begin, begin_of_log = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as file, chain.gpu_for(job) as environment:
        process = start(job, file, environment)
        chain.running.append(process)
        stopped = False
        try:
            if chain.stopping.is_set():  # it came too late to be told with the others
                stop(process)
            process.wait(None if deadline == np.inf else max(1.0, deadline - begin))
        except subprocess.TimeoutExpired:
            stopped = True
            print(f"{job.name}: the time is over, it is told to stop", flush=True)
            stop(process)
        except (KeyboardInterrupt, SystemExit):
            stop(process)
            chain.note(job, time.monotonic() - begin, done=False)
            raise
        finally:
            chain.running.remove(process)
    seconds, code = time.monotonic() - begin, process.returncode
    done = code == 0 and job.result.exists()
    chain.note(job, seconds, done)
    with log.open("rb") as file:
        file.seek(begin_of_log)
        lines = file.read().decode("utf-8", "replace").splitlines()
    lines = [line for line in lines if line.strip() and "it/s]" not in line]  # no bars of progress
    for line in lines[-(30 if code and not stopped else 8) :]:
        print(f"    {line[:300]}")
    print(f"{job.name}: {'done' if done else f'ended with {code}'} after {seconds:.0f} s", flush=True)
    if done:
        return 0
    if stopped:
        return NOT_DONE
    return code if code > 0 else 1  # killed by a signal, or without its result


def run_jobs(jobs: Sequence[Job], chain: Chain, deadline: float) -> int:
    """Run those jobs that are not done, --together at a time.

    Args:
        jobs: which need nothing of each other.
        chain, deadline: see `run_job`.

    Returns:
        0, or the exit code of the first that did not come to its end; NOT_DONE where only the time was over.
    """
    waiting = []
    for job in jobs:
        if chain.is_done(job):
            print(f"{job.name}: done already")
        else:
            waiting.append(job)
    if chain.args.together == 1:
        codes: Iterator[int] | list[int] = (run_job(job, chain, deadline) for job in waiting)
        return next((code for code in codes if code), 0)
    # Before any other can take a GPU, whichever thread is the first.
    chain.placed = {job.name: chain.place(job) for job in waiting if job.alone and chain.args.gpus > 1}
    with ThreadPoolExecutor(chain.args.together) as pool:
        started = [pool.submit(run_job, job, chain, deadline) for job in waiting]
        try:
            codes = [each.result() for each in started]
        except BaseException:  # told to stop, in this thread: the scripts are told too
            chain.stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(chain.running):
                stop(process)
            raise
    return next((code for code in codes if code not in (0, NOT_DONE)), max(codes, default=0))


def start(job: Job, log: BinaryIO, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a job's script; what it prints goes to the log."""
    return subprocess.Popen([sys.executable, *job.command], stdout=log, stderr=subprocess.STDOUT, env=environment)


def visible_gpus() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None where it is not set."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else [name for name in given.split(",") if name]


def stop(process: subprocess.Popen) -> None:
    """Tell a script to save and end, and wait for it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Settings and split


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a file by their names."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Settings of a file as flags; those that are false are left out, those that are true have no value."""
    flags = []
    for name, value in values.items():
        if value is not False:
            flags.append(f"--{name}")
            flags += [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    return flags


def settings_of(name: str, config: Path, dataset_dir: str | Path) -> Any:
    """What a script makes of a file of settings.

    Args:
        name: a stage, or "evaluate".
        config: the file.
        dataset_dir: of the run.
    """
    import importlib

    from arc.runs.settings import parse_settings

    script = STAGES[name][0] if name in STAGES else "evaluate_arc.py"
    argv = ["--config", str(config), "--dataset_dir", str(dataset_dir)]
    if name == "evaluate":
        argv += ["--models", "any"]
    return parse_settings(importlib.import_module(Path(script).stem).Settings, argv)


def check_split(chain: Chain) -> dict[str, Any]:
    """Check that all scripts hold out the same puzzles, and the tasks that are written down.

    Those of the data that split.json of --configs was made from are written there; those of other data in split.json of
    the output folder, by the first run.

    Args:
        chain: gives configurations, dataset and folders.

    Returns:
        The split: settings of SPLIT, "dataset" (a hash of all puzzles), "tasks" (how many there are), "train", "seen"
        and "unseen" (puzzles of each), "unseen_tasks" (names).

    Raises:
        ValueError: settings that do not agree, or another split than the one written down.
    """
    from arc.puzzles.splits import load_dataset
    from arc.runs.settings import DataSettings

    dataset_dir, found = chain.args.dataset_dir, {}
    names = {**{name: name for name in STAGES}, "ablation": "stage2"}
    names |= {"evaluate_greedy": "evaluate", "evaluate_search": "evaluate"}
    for name, script in names.items():
        settings = settings_of(script, chain.config(name), dataset_dir)
        found[name] = {part: getattr(settings, part) for part in SPLIT}
    if chain.config("changed").is_file():
        values = read_yaml(chain.config("changed"))
        found["changed"] = {part: values.get(part, getattr(DataSettings(), part)) for part in SPLIT}
    different = [f"{name}.yaml" for name in found if found[name] != found["stage1"]]
    if different:
        raise ValueError(f"{', '.join(different)}: not the {', '.join(SPLIT)} of stage1.yaml: puzzles would leak")
    settings = settings_of("stage1", chain.config("stage1"), dataset_dir)
    data = load_dataset(settings)
    split = data.holdout(settings.holdout_examples, settings.holdout_tasks, settings.holdout_seed)
    unseen = sorted({data.task_of(puzzle) for puzzle in split.unseen.challenge})
    present = {
        **found["stage1"],
        "dataset": data.content_hash(),
        "tasks": len({data.task_of(puzzle) for puzzle in data.challenge}),
        **{part: len(getattr(split, part).keys) for part in ("train", "seen", "unseen")},
        "unseen_tasks": unseen,
    }
    written = chain.configs / "split.json"
    if not written.is_file() or json.loads(written.read_text(encoding="utf-8"))["dataset"] != present["dataset"]:
        written = chain.output / "split.json"
        if not written.is_file():
            write_json(written, present)
    before = json.loads(written.read_text(encoding="utf-8"))
    changed = sorted(part for part in present if before.get(part) != present[part])
    if changed:
        raise ValueError(f"{written}: another split was written down ({', '.join(changed)} differ): use its settings")
    return present


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def task_of(puzzle: str) -> str:
    """The task of a puzzle, `007bbfb7-000` or `007bbfb7`."""
    return re.sub(r"-\d+$", "", puzzle)


def right(results: Mapping[str, Any], model: str) -> dict[str, bool]:
    """Test input -> whether a model's first guess is right, of a results.json."""
    return {key: entry[model]["correct"][:1] == [True] for key, entry in results["puzzles"].items()}


def probabilities(results: Mapping[str, Any], model: str) -> dict[str, float]:
    """Test input -> the probability that a model gives its solution, of a results.json."""
    found = {key: entry[model]["prob_truth"] for key, entry in results["puzzles"].items()}
    return {key: value for key, value in found.items() if value is not None}


def paired_gain(
    before: Mapping[str, float], after: Sequence[Mapping[str, float]], group: Callable[[str], str] = str
) -> dict[str, Any]:
    """How much more is solved afterwards, of the same test inputs, in points (hundredths).

    Args:
        before: test input -> solved, or how probable its solution is.
        after: the same for each seed.
        group: test input -> what is resampled as one: puzzles, or tasks.

    Returns:
        points: the mean over test inputs and seeds of after - before; ci: its 95% interval by resampling groups, each
        with its mean over the seeds; n: test inputs.
    """
    keys = [key for key in before if all(key in one for one in after)]
    if not keys or not after:
        return {"points": None, "ci": None, "n": 0}
    changes = [float(np.mean([float(one[key]) - float(before[key]) for one in after])) for key in keys]
    interval = mean_interval(changes, [group(key) for key in keys], least=-1.0)
    return {
        "points": round(100 * float(np.mean(changes)), 2),
        "ci": [round(100 * bound, 2) for bound in interval],
        "n": len(keys),
    }


def by_puzzle(key: str) -> str:
    """The puzzle of a test input `PUZZLE_INDEX`."""
    return key.rpartition("_")[0]


def by_task(key: str) -> str:
    """The task of a test input."""
    return task_of(by_puzzle(key))


def read_results(chain: Chain, name: str) -> dict[str, Any] | None:
    """A results.json of several models, put together from those of each where it is not there; None without any."""
    path = chain.output / "evaluation" / name / "results.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    piece, _, which = name.rpartition("-")
    models, kind = {
        "greedy": (chain.models, "greedy"), "search": (chain.models, "search"), "seeds": (chain.seed_models, "greedy"),
        "ablations": (chain.ablation_models, "greedy"),
    }.get(piece, (dict, ""))  # fmt: skip
    parts = {}
    for model, folder in models().items():
        for job in chain.single(kind, model, folder):
            if job.name.endswith(f"-{which}") and chain.is_done(job):  # not of a model that has been made anew since
                parts[model] = json.loads(job.result.read_text(encoding="utf-8"))
    if not parts:
        return None
    puzzles: dict[str, dict[str, Any]] = {}
    for part in parts.values():
        for key, entry in part["puzzles"].items():
            puzzles.setdefault(key, {}).update(entry)
    return {
        "models": list(parts),
        "table": [row for part in parts.values() for row in part["table"]],
        "puzzles": puzzles,
    }


def other_seeds(chain: Chain) -> range:
    """Seeds of stage 3 besides its own."""
    first = chain.first_seed()
    return range(first + 1, first + chain.args.seeds)


def score_rows(chain: Chain) -> list[dict[str, Any]]:
    """Of each model and set: one greedy guess, and two guesses from 16 views, as far as they have been measured."""
    rows = []
    for which in SETS:
        greedy, search = (read_results(chain, f"{kind}-{which}") for kind in ("greedy", "search"))
        for model in MODELS:
            row: dict[str, Any] = {"model": model, "set": which}
            found = _table_row(greedy, model)
            if found:
                solved = right(greedy, model)
                # Small grids repeat: some held-out pairs stand in a training puzzle too.
                new = [solved[key] for key, entry in greedy["puzzles"].items() if not entry["seen_test"]]
                interval = mean_interval(list(map(float, solved.values())), [by_task(key) for key in solved])
                tasks = {by_task(key) for key in solved}
                some = {by_task(key) for key, good in solved.items() if good}
                row |= {
                    "n": found["n"], "tasks": len(tasks), "tasks_solved": len(some), "exact_1": found["exact_1"],
                    "ci_1": found["exact_1_interval"], "ci_1_tasks": interval, "n_new": len(new),
                    "exact_1_new": sum(new) / len(new) if new else None, "decodable": found["decodable"],
                    "cell_accuracy": found["cell_accuracy"], "prob_truth": found["prob_truth"],
                    "prob_greedy": found.get("prob_greedy"), "seconds_1": found["seconds"],  # of older ones: none
                }  # fmt: skip
            found = _table_row(search, model)
            if found:
                row |= {
                    "n_2": found["n"], "exact_2": found["exact_2"], "ci_2": found["exact_2_interval"],
                    "exact_1_of_search": found["exact_1"], "found": found["found"], "seconds_2": found["seconds"],
                }  # fmt: skip
            if len(row) > 2:
                rows.append({"n": None, "exact_1": None, "ci_1": None, "exact_2": None, "ci_2": None} | row)
    return rows


def _table_row(results: Mapping[str, Any] | None, model: str) -> dict[str, Any] | None:
    return next((row for row in (results or {}).get("table", []) if row["model"] == model), None)


def guards_puzzles(chain: Chain) -> set[str]:
    """The held-out test inputs by which stage 3 chooses its adapter."""
    from arc.models.vocabulary import load_tokenizer
    from arc.training.data import heldout_puzzles

    settings = settings_of("stage3", chain.config("stage3"), chain.args.dataset_dir)
    if not (settings.collapse_guard and settings.eval_steps and settings.eval_puzzles):
        return set()
    dataset, _ = heldout_puzzles(settings, load_tokenizer(chain.output / MODELS["stage2"]))
    return set(dataset.keys[: settings.eval_puzzles])


def grpo_gain(chain: Chain) -> dict[str, Any] | None:
    """Stage 3 minus stage 2 with one greedy guess, mean over the seeds; None before stage 3 has been evaluated."""
    record: dict[str, Any] = {}
    for which in SETS:
        found = (read_results(chain, f"{piece}-{which}") for piece in ("seeds", "greedy"))
        results = next((one for one in found if one and {"stage2", "stage3"} <= set(one["models"])), None)
        if results is None:
            continue
        models = [name for name in results["models"] if name.startswith("stage3")]
        known = guards_puzzles(chain) if which == "seen" else set()
        (before, *after), sampled = (
            [
                {key: value for key, value in of(results, name).items() if key not in known}
                for name in ("stage2", *models)
            ]
            for of in (right, probabilities)
        )
        record[which] = {
            **paired_gain(before, after, by_puzzle),
            "sampled": paired_gain(sampled[0], sampled[1:], by_puzzle),
            "ci_tasks": paired_gain(before, after, by_task)["ci"],
            "left_out": sum(key in known for key in results["puzzles"]),
            "seeds": {
                name: {**paired_gain(before, [one], by_puzzle), "sampled": paired_gain(sampled[0], [other], by_puzzle)}
                for name, one, other in zip(models, after, sampled[1:], strict=True)
            },
        }
    if not record:
        return None
    seen = record.get("seen", {})
    return {"points": seen.get("points"), "ci": seen.get("ci"), **record}


def ablation_rows(chain: Chain) -> list[dict[str, Any]]:
    """Of each ablation: what is solved with one greedy guess, and that minus the first one's, paired."""
    rows = []
    parts = {"": "ablations", " (loaded in 4 bits)": "ablations-4bit"}
    for how, folder in parts.items():
        results = {which: read_results(chain, f"{folder}-{which}") for which in SETS}
        names = dict.fromkeys(name for found in results.values() if found for name in found["models"])
        if not set(names) - {"stage1"}:  # what all start from has been evaluated, for the main run
            continue
        first = "masked" if how == "" else "4bit-quantised"
        for name in names:
            changed = "the model that all start from" if name == "stage1" else ABLATIONS[name][0]
            row: dict[str, Any] = {"name": f"{name}{how}", "changed": changed}
            for which, found in results.items():
                one = _table_row(found, name)
                if one is None:
                    continue
                row[which] = {"n": one["n"], "exact_1": one["exact_1"], "ci_1": one["exact_1_interval"]}
                if name not in (first, "stage1") and first in found["models"]:
                    before, after = right(found, first), [right(found, name)]
                    row[which][f"to_{first}"] = {
                        **paired_gain(before, after, by_puzzle),
                        "ci_tasks": paired_gain(before, after, by_task)["ci"],
                    }
            rows.append(row)
    return rows


def training_figures(lora: Path) -> dict[str, Any]:
    """Steps, tokens and seconds of a training, from its metrics.jsonl.

    Returns:
        tokens: all that the steps had; training_seconds: of the steps alone, without measuring, loading and merging.
    """
    from arc.training.curves import read_metrics

    path = lora / "metrics.jsonl"
    if not path.is_file():
        return {}
    records = read_metrics(path)
    losses = [record for record in records if isinstance(record.get("loss"), (int, float))]
    tokens = seconds = 0.0
    for record in losses:
        now = record.get("num_input_tokens_seen", record.get("num_tokens"))
        if now is not None and record.get("tokens_per_s"):
            seconds += (now - tokens) / record["tokens_per_s"]
            tokens = now
    return {
        "steps": max((record["step"] for record in losses), default=0),
        "tokens": int(tokens),
        "training_seconds": round(seconds, 3),
        "last_loss": losses[-1]["loss"] if losses else None,
        "heldout_loss": next((r["eval_loss"] for r in reversed(records) if r.get("eval_loss") is not None), None),
    }


def stage_rows(chain: Chain) -> list[dict[str, Any]]:
    """Seconds and tokens of each stage, and which step's adapter stage 3 kept."""
    rows = []
    for name in ("base", *STAGES, *(job for job in chain.state if job.startswith(("seed", "ablation")))):
        kept = chain.state.get(name)
        if not kept or not kept["done"] or name.startswith(("seeds-", "ablations-")):
            continue
        row: dict[str, Any] = {"name": name, "seconds": round(sum(kept["seconds"]), 1), "starts": len(kept["seconds"])}
        if name == "base":
            made = json.loads((chain.output / "base" / "make_base.json").read_text(encoding="utf-8"))
            done = made.get("pretraining", {})
            row |= {n: done[n] for n in ("steps", "tokens", "loss_of_replies", "device") if n in done}
            row |= {"training_seconds": done.get("seconds", 0.0), "trained_on": made["trained_on"]}
        else:
            lora = adapter_of(chain, name)
            row |= training_figures(lora)
            if (lora / "manifest.json").is_file():
                manifest = json.loads((lora / "manifest.json").read_text(encoding="utf-8"))
                row |= {part: manifest[part] for part in ("scan", "policy") if manifest.get(part)}
        rows.append(row)
    return rows


def adapter_of(chain: Chain, name: str) -> Path:
    """The -lora folder of a job."""
    if name.startswith("ablation-"):
        ablation = name.removeprefix("ablation-")
        return chain.output / "ablations" / ablation / f"{PREFIX}-{STAGES[ABLATIONS[ablation][2]][1]}-lora"
    if name.startswith("seed"):
        return chain.output / name / f"{PREFIX}-Final-RL-lora"
    return chain.output / f"{PREFIX}-{STAGES[name][1]}-lora"


def write_record(chain: Chain, split: Mapping[str, Any]) -> None:
    """Write --results with all that has been measured so far, and the curves beside it."""
    from train import machine  # benchmarks/train.py

    from arc.runs.artifacts import versions

    path = Path(chain.args.results)
    record = {
        "machine": machine(),
        "versions": versions(),
        "commands": {name: kept["command"] for name, kept in chain.state.items()},
        "figures": {
            "exact_1": "one greedy guess (evaluate_greedy.yaml)",
            "exact_2": "two guesses from several views (evaluate_search.yaml)",
            "ci_1, ci_2": "95%, Wilson's, of puzzles",
            "ci_1_tasks": "95%, tasks resampled",
            "exact_1_new": "exact_1 of those n_new test inputs whose pair stands in no training puzzle",
            "prob_truth": "mean probability of the solution: the share of samples at temperature 1 that are right",
            "prob_greedy": "mean probability of the greedy reply: about exact_1, where a model knows what it knows",
            "grpo_gain": "stage 3 minus stage 2, one greedy guess, points, mean over seeds; 95%, puzzles resampled; "
            "sampled: the same of prob_truth",
        },
        "settings": {config.stem: read_yaml(config) for config in sorted(chain.configs.glob("*.yaml"))},
        "split": split,
        "stages": stage_rows(chain),
        "rows": score_rows(chain),
        "grpo_gain": grpo_gain(chain),
        "ablations": ablation_rows(chain),
    }
    write_json(path, record)
    try:
        plot_stages(chain, path.with_suffix(".png"))
    except ImportError as error:  # a machine for training need not have matplotlib
        print(f"note: no picture of the curves ({error})")


def plot_stages(chain: Chain, out: Path) -> None:
    """Draw the curves of the stages, one row each; nothing, if none has been trained."""
    from matplotlib.figure import Figure

    from arc.training.curves import draw_curves, find_curves, read_metrics

    panels = dict.fromkeys(STAGES, ("loss", "share of puzzles solved", "tokens per second"))
    panels["stage3"] = ("reward", *panels["stage3"][1:])  # of its loss the policy's part is about 0 whatever is learned
    found = {}
    for name in STAGES:
        metrics = adapter_of(chain, name) / "metrics.jsonl"
        if metrics.is_file():
            found[name] = find_curves(read_metrics(metrics))
    if not found:
        return
    figure = Figure(figsize=(13.5, 3.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 3, squeeze=False)
    for row, (name, curves) in zip(axes, found.items(), strict=True):
        for axis, title in zip(row, panels[name], strict=True):
            if title in curves:
                draw_curves(axis, f"{name}: {title}", curves[title])
            else:
                axis.set_axis_off()
    figure.savefig(out, dpi=100)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of what each model solves."""

    def share(row: Mapping[str, Any], value: str, interval: str) -> str:
        if row[value] is None:
            return "-"
        low, high = row[interval]
        return f"{row[value]:.1%} ({100 * low:.0f} to {100 * high:.0f})"

    print("\n| model | set | one greedy guess | two guesses, 16 views |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['model']} | {row['set']} | {share(row, 'exact_1', 'ci_1')} | {share(row, 'exact_2', 'ci_2')} |")
    print()


def write_json(path: Path, value: Any) -> None:
    """Write at once: a run that is killed leaves the old file or the new one."""
    from arc.puzzles.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset_dir", required=True, help="folder of task files")
    parser.add_argument("--output_dir", default="learn/output", help="folder of models, evaluations and logs")
    parser.add_argument("--configs", type=Path, default=ROOT / "learn", help="folder of the settings")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(MAIN_PIECES), help="what is run")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="what is evaluated")
    parser.add_argument("--seeds", type=int, default=3, help="of stage 3, its own included")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument(
        "--together", type=int, default=1, help="jobs at a time, of those that need nothing of each other"
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that jobs at a time are spread over")
    parser.add_argument("--time_limit", type=float, default=np.inf, help="seconds after which it stops, to go on later")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "learn.json")
    args = parser.parse_args(argv)
    for name in ("together", "gpus"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: expected a whole number from 1")
    visible = visible_gpus()
    if args.gpus > 1 and visible is not None and len(visible) < args.gpus:
        parser.error(f"--gpus is {args.gpus}, and CUDA_VISIBLE_DEVICES names {len(visible)}")
    args.configs = Path(os.path.relpath(args.configs))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pieces that are not done, write what has been measured; return the exit code."""
    args = parse_flags(argv)
    deadline = time.monotonic() + args.time_limit
    chain = Chain(args)
    code, written = 0, False
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the script that runs is told to stop too
    try:
        split = check_split(chain)
        for jobs in chain.jobs(args.pieces):
            code = run_jobs(jobs, chain, deadline)
            if code:
                break
            written = any(job.result.name == "results.json" and not job.name.startswith("single-") for job in jobs)
            if written:
                write_record(chain, split)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    if code or not written:
        write_record(chain, split)
    print_rows(score_rows(chain))
    print(args.results)
    if code == NOT_DONE:
        print("not done yet: run the same command again")
    return code


if __name__ == "__main__":
    sys.exit(main())
