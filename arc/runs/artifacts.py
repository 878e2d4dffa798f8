"""Artifacts: folders that are complete when they have their name, know what they were made from, and can be checked.

A folder of the pipeline (`-prepared`, `-lora`, `-merged`) is written beside its place, flushed to the disk and renamed.
Its manifest.json says how it was made, from what, and the sha256 of each of its files. So a stage can tell, before it
skips or builds on a folder, whether it is whole and whether what it was made from is still the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arc.models.manifests import MANIFEST, absolute_reference, read_manifest, write_manifest
from arc.models.prepared_base import check_base
from arc.puzzles.files import flush
from arc.runs.settings import RunSettings, course_settings, default_course

INCOMPLETE = ".incomplete"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "numpy",
)
# Files that make a model; what else lies in a folder (logs, pictures, notes, other formats) is about it.
MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")
# Settings that later versions no longer have, with their defaults: records from before them still hold these.
REMOVED_SETTINGS = {"task_augmentation": 0, "lora_bias": "none", "use_vllm": False}
# adapter_config.json names the base by its path, which differs from place to place; the weights show the rest of it.
ABOUT_THE_MODEL = (MANIFEST, "probe.safetensors", "make_base.json", "adapter_config.json")


@dataclass(frozen=True)
class Stage:
    """Names of a stage and of the artifact that it starts from.

    Args:
        name: "Base", "Final" or "Final-RL".
        parent: what it starts from: "prepared", or the name of an earlier stage.
        script: the file, for messages.
        parent_script: the file that makes the parent, for messages.
    """

    name: str
    parent: str
    script: str
    parent_script: str

    def lora(self, settings: RunSettings) -> Path:
        """Folder of the adapter."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-lora"

    def merged(self, settings: RunSettings) -> Path:
        """Folder of the merged model."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-merged"

    def checkpoints(self, settings: RunSettings) -> Path:
        """Folder of the checkpoints and logs of the training, beside the artifacts."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{self.name}-checkpoints"

    def prepared(self, settings: RunSettings) -> Path:
        """Folder of the prepared base."""
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-prepared"

    def default_parent(self, settings: RunSettings) -> Path:
        """Folder that the stage starts from if no other is named."""
        name = "prepared" if self.parent == "prepared" else f"{self.parent}-merged"
        return Path(settings.output_dir) / f"{settings.artifact_prefix}-{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete: written beside, sealed, flushed, then renamed.

    Yields:
        The folder to write into. If the block raises, nothing stays; if the process is killed, a folder of another name
        does, which the next run removes.

    Raises:
        FileExistsError: `path` exists; nothing is ever overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + INCOMPLETE)
    if beside.exists():  # what a killed run left
        shutil.rmtree(beside)
    beside.mkdir()
    try:
        yield beside
        _seal(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    beside.rename(path)
    flush(path.parent)


def _seal(folder: Path) -> None:
    # The manifest names every file with its hash; then all of it reaches the disk before the folder gets its name.
    manifest = read_manifest(folder)
    if manifest:
        write_manifest(folder, {**manifest, "files": file_table(folder)})
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def move_aside(path: Path) -> Path:
    """Give a folder another name, `NAME.old-1` or the next free one, and say so. Nothing is deleted."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"moved {path} aside: {aside}")
    return aside


def provenance(stage: str, script: str, settings: RunSettings, **more: Any) -> dict[str, Any]:
    """What an artifact records of its making: stage, script, settings, versions, time, and what is given."""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"stage": stage, "script": script, "settings": asdict(settings), "versions": versions(), "made": made}
    return {**about, **more}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training depends on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What a folder is


def makes_the_model(name: str) -> bool:
    """Whether a file of a folder, by its relative name, is part of the model."""
    return "/" not in name and name.endswith(MODEL_SUFFIXES) and name not in ABOUT_THE_MODEL


def file_table(folder: Path, *, model_only: bool = False) -> dict[str, dict[str, Any]]:
    """Size (bytes), time of change (ns) and sha256 of the files of a folder but its manifest, by relative name.

    Args:
        folder: any folder.
        model_only: only of the files that make the model; for folders that are not ours.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    table = {}
    for path in sorted(p for p in files if not model_only or makes_the_model(p.relative_to(folder).as_posix())):
        state = path.stat()
        table[path.relative_to(folder).as_posix()] = {
            "bytes": state.st_size,
            "mtime_ns": state.st_mtime_ns,
            "sha256": _sha256(path),
        }
    return table


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_changed_file(folder: Path, table: dict[str, dict[str, Any]]) -> str | None:
    """What differs between a folder and the table of its files, as words; None if nothing does.

    A file of the recorded size and time counts as the same; one whose time differs (a copy) is hashed.
    """
    for name, recorded in table.items():
        path = folder / name
        try:
            state = path.stat()
        except OSError:
            return f"{name} is missing"
        if state.st_size != recorded["bytes"]:
            return f"{name} has {state.st_size:,} bytes, not {recorded['bytes']:,}"
        if state.st_mtime_ns != recorded["mtime_ns"] and _sha256(path) != recorded["sha256"]:
            return f"{name} is not the file that was written (its sha256 differs)"
    return None


def fingerprint(folder: str | Path) -> str:
    """A sha256 that tells one model or adapter from another by the contents of its files.

    Two runs with the same result have the same one, wherever they stand. Of a hub name it is the name's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return hashlib.sha256(str(folder).encode()).hexdigest()
    table = read_manifest(folder).get("files") or file_table(folder, model_only=True)
    parts = sorted((name, entry["sha256"]) for name, entry in table.items() if makes_the_model(name))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_damage(folder: Path, kind: str = "model") -> str | None:
    """What is wrong with a folder that exists, as words; None if it is whole.

    Args:
        folder: an artifact, or a model or adapter that was made elsewhere.
        kind: "model" or "adapter": what it should be.
    """
    if not folder.is_dir():
        return "it is no folder"
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest.get("files"):
        # A log or picture that someone looked at and changed is no damage to the model.
        return find_changed_file(folder, {n: e for n, e in manifest["files"].items() if n.endswith(MODEL_SUFFIXES)})
    problem = find_model_problem(folder, kind)
    if problem is None:
        print(f"note: {folder} has no {MANIFEST} with its files: made elsewhere; it was looked through and is used")
    return problem


def find_model_problem(folder: Path, kind: str = "model") -> str | None:
    """What keeps a folder from being loaded as a model or an adapter, as words; None if nothing does.

    Reads the configuration, the tokenizer and the headers of the weights, not the weights: every tensor that the
    configuration asks for must be there in its shape.

    Args:
        folder: of the model.
        kind: "model" or "adapter".
    """
    config = "adapter_config.json" if kind == "adapter" else "config.json"
    if not (folder / config).is_file():
        found = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
        return f"it holds no {config}" + (f" but a {found[0]}: that is no {kind}" if found else "")
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return f"{path.name} is not JSON"
        if path.name == "adapter_config.json" and (not isinstance(content, dict) or content.get("peft_type") != "LORA"):
            return f"{path.name} is of no LoRA adapter"
    shapes = _stored_shapes(folder, "adapter_model" if kind == "adapter" else "model")
    if isinstance(shapes, str):
        return shapes
    if kind == "adapter":
        return _incomplete_pair(shapes)
    if not (folder / "tokenizer.json").is_file():
        return "it holds no tokenizer.json (a fast tokenizer)"
    return _compare_with_config(folder, shapes)


def _incomplete_pair(shapes: dict[str, tuple[int, ...]]) -> str | None:
    # LoRA's matrices come in pairs.
    if not shapes:
        return "adapter_model.safetensors is empty"
    for name in shapes:
        for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if f".{one}." in name and name.replace(f".{one}.", f".{other}.") not in shapes:
                return f"adapter_model.safetensors lacks {name.replace(one, other)}"
    return None


def _stored_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]] | str:
    # Names and shapes of all tensors from the headers of the files, or what is wrong with those.
    from safetensors import SafetensorError, safe_open

    index = folder / f"{name}.safetensors.index.json"
    files = [f"{name}.safetensors"]
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"{index.name} is no index of weights"
    shapes = {}
    for file in files:
        if not (folder / file).is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
            also = f" ({pickles[0]} is a pickle, which can run code: never loaded)" if pickles else ""
            return f"it holds no {file}{also}"
        try:
            with safe_open(folder / file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            return f"{file} cannot be read ({str(error).splitlines()[0]})"
    return shapes


def _compare_with_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a bad configuration makes transformers raise
        return f"config.json is of no model that can be loaded ({(str(error).strip() or repr(error)).splitlines()[0]})"
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # shared with the embedding, stored once
        stored = shapes.get(name)
        if stored is None:
            return f"its weights lack {name}"
        if stored != tuple(tensor.shape):
            return f"{name} is of shape {list(stored)}, config.json asks for {list(tensor.shape)}"
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception for whatever is wrong with a file
        return f"tokenizer.json cannot be read ({str(error).splitlines()[0]})"
    highest, rows = max(tokenizer.get_vocab().values(), default=-1), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        return f"its tokenizer has ids up to {highest}, its embedding {rows} rows: they are not of one model"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Whether a folder is still what its settings and parents make


def made_from(folder: Path | str, of: Path) -> dict[str, str]:
    """A manifest's record of what an artifact was made from: {name: fingerprint}.

    Args:
        folder: the parent; one in the same output folder is named without its path, so that both can move.
        of: the artifact.
    """
    beside = Path(folder).is_dir() and Path(folder).resolve().parent == of.resolve().parent
    return {Path(folder).name if beside else absolute_reference(folder): fingerprint(folder)}


def find_outdated(folder: Path) -> str | None:
    """The first artifact of a chain that was made from something that has been made anew since, as words.

    Follows manifests from a folder to its parents; parents that are not there any more are taken on trust.
    """
    manifest = read_manifest(folder)
    for name, recorded in manifest.get("made_from", {}).items():
        parent = folder.parent / name  # an absolute name stays what it is
        if not parent.is_dir():
            continue
        if fingerprint(parent) != recorded:
            script = manifest.get("script", "the script that made it")
            return (
                f"{folder} was made from another {name} than the one that is there now: run {script} again, as it was "
                "run, with --overwrite"
            )
        earlier = find_outdated(parent)
        if earlier:
            return earlier
    return None


def changed_settings(
    recorded: dict[str, Any], settings: RunSettings, precision: dict[str, Any], data: str | None
) -> list[str]:
    """What decides the weights and differs from what an adapter was trained with, as `name (was X, is Y)`.

    Args:
        recorded: the adapter's manifest.
        settings: of this run.
        precision: those of engine, dtype and load_in_4bit that the user has named; the others may be what they were.
        data: fingerprint of its puzzles; None if they are not at hand.
    """
    before = course_settings(recorded.get("settings", {}))
    if recorded.get("settings"):  # a setting that an earlier version did not have had what is the default now
        before = default_course(type(settings)) | before
    now = course_settings(json.loads(json.dumps(asdict(settings))))
    pairs = {name: (before[name], now[name]) for name in now if name in before}
    if recorded.get("precision"):
        pairs |= {name: (recorded["precision"][name], value) for name, value in precision.items()}
    changed = [f"{name} (was {_short(a)}, is {_short(b)})" for name, (a, b) in pairs.items() if a != b]
    changed += changed_removed(before, now)
    if data is not None and recorded.get("data_fingerprint", data) != data and not changed:
        extra = recorded.get("settings", {}).get("extra_dataset_dirs", [])
        if extra != settings.extra_dataset_dirs:
            named = [" ".join(folders) or "not set" for folders in (extra, settings.extra_dataset_dirs)]
            changed.append("extra_dataset_dirs (was {}, is {})".format(*named))
        else:  # other settings choose other puzzles: said already
            changed.append(f"the puzzles in {', '.join([settings.dataset_dir, *extra])}")
    return changed


def changed_removed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings of a record that no longer exist and were not at their default, as `name (was X, ...)`.

    Args:
        before: the recorded settings.
        now: those of this run.
    """
    return [
        f"{name} (was {_short(before[name])}, this setting was removed)"
        for name, default in REMOVED_SETTINGS.items()
        if name not in now and before.get(name, default) != default
    ]


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value).lower()


def find_parent(stage: Stage, settings: RunSettings, without_prepared: bool = False) -> Path | str:
    """What a stage starts from: a folder or, for a base model that is fetched, its hub name. Nothing is written.

    For stage 1 it is the prepared base where that is there, else the base model that it will be made from, as it is
    `without_prepared`, where that will be made anew.

    Raises:
        FileNotFoundError: no such model, or the parent stage has not run.
        ValueError: the model is quantised already, damaged or outdated, or the prepared base is another one's.
    """
    output = Path(settings.output_dir)
    if stage.parent == "prepared":
        prepared = stage.prepared(settings)
        if prepared.exists() and not without_prepared:
            print(f"{prepared} is there: used")
            return prepared
        parent: Path | str = settings.base_model or ""
    else:
        parent = settings.base_model or stage.default_parent(settings)
        if settings.base_model is None and not Path(parent).exists():
            raise FileNotFoundError(
                f"{parent} is not there: {stage.script} starts from the merged model of {stage.parent_script}. Run "
                f"`python {stage.parent_script} --output_dir {output}` first, or name a model with --base_model"
            )
    if not Path(parent).is_dir():
        check_base(parent)
        return str(parent)
    parent = Path(parent)
    again = f"; run {stage.parent_script} again as it was run, with --overwrite: only what is damaged is made anew"
    made_here = read_manifest_or_nothing(parent)
    if made_here.get("files"):
        problem = find_damage(parent)
        outdated = None if problem else find_outdated(parent)
        if problem or outdated:
            raise ValueError((f"{parent} is damaged: {problem}" if problem else str(outdated)) + again)
    check_base(parent)
    if not made_here.get("files"):
        problem = find_model_problem(parent)
        if problem:
            raise ValueError(f"{parent} is no complete model: {problem}")
    return parent


def read_manifest_or_nothing(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty if there is none or it cannot be read."""
    with contextlib.suppress(ValueError):
        return read_manifest(folder)
    return {}


def stale_base(prepared: Path, settings: RunSettings) -> str | None:
    """Why a prepared base does not fit the settings, as words; None if it does."""
    made = read_manifest(prepared)
    if not made:
        return None
    base, full_vocab = made.get("base_model"), made.get("settings", {}).get("full_vocab", settings.full_vocab)
    other = (
        f"{prepared} was prepared from {base} with full_vocab {str(full_vocab).lower()}, asked for is "
        f"{settings.base_model} with full_vocab {str(settings.full_vocab).lower()}: use those flags, another "
        "--output_dir, or --overwrite, which moves it aside and prepares it anew"
    )
    if full_vocab != settings.full_vocab:
        return other
    if settings.base_model is not None and Path(settings.base_model).is_dir():
        table = made.get("base_files")
        changed = find_changed_file(Path(settings.base_model), table) if table else None
        if changed and str(settings.base_model) == base:
            return (
                f"{prepared} was prepared from {base} as it was then ({changed}): bring that back, or --overwrite, "
                "which moves it aside and prepares it anew"
            )
        return other if changed else None
    return other if base is not None and base != str(settings.base_model) else None


def existing(folders: Sequence[Path]) -> list[Path]:
    """Those of the folders that are there."""
    return [folder for folder in folders if folder.exists()]
