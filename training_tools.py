"""One run of a stage: data, trainer, logs; train, then merge.

The stage scripts decide what is trained on what; this module does what they have in common. Heavy libraries are
imported inside functions, Unsloth before the libraries that it patches.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from arc_loader import ArcDataset, Holdout, format_options
from arc_samples import SampleEncoder, TrainingSamples
from artifact_tools import (
    INCOMPLETE,
    OutputLock,
    Stage,
    changed_settings,
    existing,
    file_table,
    find_damage,
    find_outdated,
    find_parent,
    fingerprint,
    made_from,
    move_aside,
    new_folder,
    provenance,
    read_manifest_or_nothing,
    stale_base,
    versions,
)
from distributed_tools import (
    divide_batch,
    fail,
    gather,
    is_main,
    leave,
    process_count,
    share,
    wait_for_everyone,
)
from merge_tools import PROBE, MergeError, describe_check, make_probe_rows, merge_and_check, record_probe
from model_tools import (
    EMBEDDING_MODULES,
    InputMaskingDataCollator,
    absolute_reference,
    config_token_ids,
    cut_tokenizer,
    format_duration,
    load_tokenizer,
    prepare_base,
    print_mask_report,
    read_manifest,
    resolve_precision,
    save_adapter,
    train_in_float32,
    write_manifest,
)
from packing_tools import use_packed_attention
from report_tools import read_metrics
from rollout_tools import make_rollouts
from run_guards import (
    StopSignals,
    complete_checkpoints,
    count_weights,
    disk_needs,
    find_shortages,
    flush,
    generation_steps,
    guard,
    machine_errors,
    memory_needs,
    read_free,
    refuse_pickles,
)
from run_settings import DataSettings, RunSettings, course_settings, user_errors

SAVE_SECONDS = 300.0  # of work between checkpoints, unless --save_steps says otherwise
PROBE_ROWS = 64  # held-out puzzles on which a merge is compared with the trained model
COURSE = "course.json"  # beside the checkpoints: what decides the course of the training that they are of

# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class StageData:
    """Rows of a stage: what is trained on, what is held out, and how rows become tokens."""

    split: Holdout
    samples: TrainingSamples
    encoder: SampleEncoder
    tokenizer: Any
    heldout: ArcDataset

    @property
    def format(self) -> dict[str, str]:
        """The text format's options."""
        return format_options(self.tokenizer.eos_token)

    def prompts(self, count: int, max_tokens: int) -> list[dict[str, Any]]:
        """Up to `count` held-out rows that end where the reply begins, as the encoder gives them."""
        return self.encoder.encode(self.heldout, self.heldout.keys[:count], max_tokens=max_tokens, reply=False)

    def heldout_rows(self, max_tokens: int) -> list[dict[str, Any]]:
        """All held-out rows with their replies."""
        return self.encoder.encode(self.heldout, self.heldout.keys, max_tokens=max_tokens)


def load_dataset(settings: DataSettings) -> ArcDataset:
    """Load the dataset folder, the same way in every script.

    Raises:
        ValueError, FileNotFoundError: bad data, missing folder.
    """
    bounds = tuple(settings.grid_sizes) or None
    try:
        return ArcDataset.load_from_local_json(
            settings.dataset_dir, sizes=tuple(settings.sizes), seed=settings.dataset_seed, grid_sizes=bounds
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; name yours with --dataset_dir, or make one to try with: python demo/make_dataset.py --out "
            f"{settings.dataset_dir}"
        ) from None


def split_dataset(data: ArcDataset, settings: DataSettings, quiet: bool = False) -> Holdout:
    """Split a dataset, the same way in every script; `n` limits what is trained on.

    Prints how many puzzles there are, unless `quiet`.

    Raises:
        ValueError: more held out or asked for than there is.
    """
    try:
        split = data.holdout(settings.holdout_examples, settings.holdout_tasks, settings.holdout_seed)
    except ValueError as error:
        raise ValueError(f"--holdout_examples, --holdout_tasks: {settings.dataset_dir}: {error}") from None
    train = split.train if settings.n is None else split.train.subset(settings.n)
    if not quiet:
        if data.left_out:
            print("left out: " + ", ".join(f"{count:,} {what}" for what, count in data.left_out.items()))
        print(
            f"{settings.dataset_dir}: {len(data.keys):,} base puzzles; {len(train.keys):,} to train on, held out "
            f"{len(split.seen.keys):,} of the same tasks and {len(split.unseen.keys):,} of "
            f"{settings.holdout_tasks} others"
        )
    return split._replace(train=train)


def load_split(settings: DataSettings, quiet: bool = False) -> Holdout:
    """Load the dataset folder and split it; see `load_dataset` and `split_dataset`."""
    return split_dataset(load_dataset(settings), settings, quiet)


def augmentation(settings: RunSettings) -> dict[str, Any]:
    """The settings' augmentation as keyword arguments of the loader."""
    choice = {"all": "all", "true": True, "false": False}
    return {
        "tp": choice[settings.tp.lower()],
        "rt": choice[settings.rt.lower()],
        "perm": settings.perm,
        "keep_background": settings.keep_background,
        "shfl_ex": settings.shfl_ex,
    }


def stage_tokenizer(run: StageRun) -> Any:
    """The tokenizer of a stage: its parent's, cut as the prepared base's will be where that is not made yet."""
    tokenizer = load_tokenizer(run.parent)
    if run.to_prepare is not None and not run.settings.full_vocab:
        from transformers import AutoConfig

        tokenizer, _ = cut_tokenizer(
            tokenizer, config_token_ids(AutoConfig.from_pretrained(str(run.parent), trust_remote_code=False))
        )
    return tokenizer


def load_data(run: StageRun, solved_only: bool = False) -> StageData:
    """Load and split the data and make the rows that are trained on. What is left out is counted and printed.

    Args:
        run: gives the settings and what is started from.
        solved_only: train on puzzles with solutions only; else the others are trained on by their demonstrations.

    Raises:
        ValueError, FileNotFoundError: bad data, or nothing that fits `max_seq_length`.
    """
    settings, tokenizer = run.settings, stage_tokenizer(run)
    split = load_split(settings)
    if solved_only:
        split = split._replace(train=with_solutions(split.train, "to train on"))
        if not len(split.train.keys):
            raise ValueError(f"{settings.dataset_dir}: no puzzle to train on has the outputs of its tests")
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    samples = TrainingSamples(
        split.train, encoder, settings.max_seq_length, seed=settings.seed, **augmentation(settings)
    )
    if samples.dropped:
        print(
            f"left out: {len(samples.dropped):,} puzzles that do not fit --max_seq_length {settings.max_seq_length} "
            f"with one demonstration ({', '.join(samples.dropped[:3])}{', ...' if len(samples.dropped) > 3 else ''})"
        )
    if len(samples) == 0:
        raise ValueError(f"no puzzle fits --max_seq_length {settings.max_seq_length}: raise it, or lower --sizes")
    # New puzzles of trained tasks tell whether training works; whole held-out tasks are kept for the evaluation.
    heldout = fitting(split.seen if len(split.seen.keys) else split.unseen, encoder, settings.max_seq_length)
    return StageData(split, samples, encoder, tokenizer, heldout)


def with_solutions(puzzles: ArcDataset, what: str) -> ArcDataset:
    """The puzzles whose tests have outputs; those that lack them are counted and printed."""
    solved = puzzles.select_puzzles(puzzles.challenge.keys() & puzzles.solutions.keys())
    if missing := len(puzzles.keys) - len(solved.keys):
        print(f"left out: {missing:,} of {len(puzzles.keys):,} {what}: no outputs of their tests")
    return solved


def fitting(heldout: ArcDataset, encoder: SampleEncoder, max_tokens: int) -> ArcDataset:
    """The held-out puzzles that have solutions and fit the longest row; the others are counted and printed."""
    heldout = with_solutions(heldout, "held out")
    long = set(encoder.too_long(heldout, heldout.keys, max_tokens, turned=False))
    if not long:
        return heldout
    print(f"held out: {len(long)} of {len(heldout.keys)} puzzles do not fit --max_seq_length and are not measured")
    return heldout.change_keys([key for key in heldout.keys if key not in long])


def heldout_puzzles(settings: RunSettings, tokenizer: Any) -> tuple[ArcDataset, SampleEncoder]:
    """What a stage with these settings measures on: new puzzles of trained tasks, else those of held-out tasks."""
    encoder = SampleEncoder(tokenizer, **format_options(tokenizer.eos_token))
    split = load_split(settings, quiet=True)
    return fitting(split.seen if len(split.seen.keys) else split.unseen, encoder, settings.max_seq_length), encoder


def report_masks(run: StageRun, data: StageData, collator: InputMaskingDataCollator) -> None:
    """Print what is learned, how much there is, and about how long it will take."""
    settings = run.settings
    lengths = data.samples.lengths()
    steps_per_epoch = math.ceil(len(data.samples) / batch_size(settings))
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps / steps_per_epoch
    tokens = float(lengths.mean()) * len(data.samples) * epochs
    seed_rows = np.random.default_rng(settings.seed).permutation(len(data.samples))[:32]
    rows = data.samples.__getitems__(seed_rows.tolist())
    seconds = estimate_seconds(run, tokens) / process_count()
    print_mask_report(rows, collator, lengths=lengths, rows_per_epoch=len(data.samples), epochs=epochs, seconds=seconds)
    shortened = data.samples.shortened()
    if shortened:
        print(f"shortened: {shortened:.1%} of the samples lose demonstrations to fit {settings.max_seq_length} tokens")


def batch_size(settings: RunSettings) -> int:
    """Samples of one optimizer step."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


# Share of the machine's measured matrix rate that training reached; see benchmarks/README.md.
EFFICIENCY = {("unsloth", "cuda"): 0.12, ("transformers", "cuda"): 0.35, ("transformers", "cpu"): 0.35}


def estimate_seconds(run: StageRun, tokens: float) -> float:
    """Rough seconds for training on `tokens` tokens: 6 operations a parameter and token at a rate measured just now."""
    import torch
    from transformers import AutoConfig

    precision = run.precision
    config = AutoConfig.from_pretrained(str(run.parent), trust_remote_code=False)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * (hidden * hidden * 3 + 3 * hidden * config.intermediate_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 4096 if device == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=precision.torch_dtype)
    for _ in range(3):
        a @ a
    synchronise = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronise()
    begin = time.perf_counter()
    for _ in range(10):
        a @ a
    synchronise()
    rate = 10 * 2 * side**3 / (time.perf_counter() - begin)
    return 6 * parameters * tokens / (rate * EFFICIENCY[precision.engine, device])


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


class EpochSampler:
    """Rows of an epoch in a seeded order that depends on (seed, epoch) alone.

    Yields `epoch * rows + index`, so that a row number names its epoch: the views of an epoch are its own, in whatever
    process a row is made. Processes that work together take turns with whole forward passes: where those of an epoch do
    not come out even, a number that stands for nothing to learn (see `FilledSamples`) makes up for it.

    Args:
        rows: of an epoch.
        seed: of the order.
        multiple_of: an epoch is filled up to a multiple of this.
        filler: the number that it is filled up with.
    """

    def __init__(self, rows: int, seed: int, multiple_of: int = 1, filler: int = -1):
        """See the class."""
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.fillers = [filler] * (-rows % multiple_of)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer when an epoch begins."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        """Row numbers of the current epoch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        return iter((self.epoch * self.rows + order).tolist() + self.fillers)

    def __len__(self) -> int:
        """Rows of one epoch, and what fills it up."""
        return self.rows + len(self.fillers)


class FilledSamples:
    """Samples, and a row number beyond them that gives a short row of which nothing is learned.

    So all processes have as many forward passes as the others, and no view is seen twice: the loss is a sum over the
    learned tokens of all, to which such a row adds nothing.

    Args:
        samples: rows by number.
        filler: the number, above those of the samples.
    """

    TOKENS = 8

    def __init__(self, samples: TrainingSamples, filler: int):
        """See the class."""
        self.samples, self.filler = samples, filler

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number; "filler" says which of them are none of the samples."""
        made = self.samples.__getitems__([0 if row == self.filler else row for row in rows])
        return [
            {**row, "input_ids": row["input_ids"][: self.TOKENS], "reply_spans": row["reply_spans"][:0], "filler": True}
            if number == self.filler
            else {**row, "filler": False}
            for number, row in zip(rows, made, strict=True)
        ]


def lazy_dataset(rows: Any, count: int) -> Any:
    """A datasets.Dataset of `count` row numbers whose rows are made when read (trl takes no other map-style one)."""
    from datasets import Dataset

    def make(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = rows.__getitems__(batch["row"]) if hasattr(rows, "__getitems__") else [rows[i] for i in batch["row"]]
        return {name: [row[name] for row in made] for name in made[0]}

    return Dataset.from_dict({"row": list(range(count))}).with_transform(make)


def planned_rows(run: StageRun, data: StageData, rows_per_step: int) -> int:
    """Rows of as many epochs as the training may enter: each epoch has views of its own."""
    rows, settings = len(data.samples), run.settings
    epochs = settings.num_train_epochs if settings.max_steps < 0 else settings.max_steps * rows_per_step / rows
    return rows * (math.ceil(epochs) + 1)  # one more: a trainer counts an epoch's last, short batch as a step


def sft_trainer(model: Any, run: StageRun, data: StageData, collator: InputMaskingDataCollator) -> Any:
    """The trainer of a supervised stage: UnslothTrainer on the Unsloth engine, transformers' Trainer otherwise.

    Both have the same parameter groups (`embedding_learning_rate` for embed_tokens and lm_head), order and views.
    """
    settings, precision = run.settings, run.precision
    heldout = data.heldout_rows(settings.max_seq_length)
    measured = settings.eval_steps > 0 and len(heldout) > 0
    arguments = {
        **common_arguments(run),
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "eval_strategy": "steps" if measured else "no",
        "eval_steps": settings.eval_steps if measured else None,
        "include_num_input_tokens_seen": "non_padding",
        "prediction_loss_only": True,
    }
    samples, sampler = data.samples, EpochSampler(len(data.samples), settings.seed)
    if process_count() > 1:
        filler = planned_rows(run, data, batch_size(settings))
        together = arguments["per_device_train_batch_size"] * process_count()
        samples = FilledSamples(data.samples, filler)
        sampler = EpochSampler(len(data.samples), settings.seed, multiple_of=together, filler=filler)
    if precision.engine == "transformers":
        from transformers import Trainer, TrainingArguments

        base, arguments = Trainer, TrainingArguments(**arguments)
        arguments.embedding_learning_rate = settings.embedding_learning_rate
        train, evaluation = samples, heldout
    else:
        from unsloth import UnslothTrainer, UnslothTrainingArguments

        base = UnslothTrainer
        arguments = UnslothTrainingArguments(
            embedding_learning_rate=settings.embedding_learning_rate,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=settings.max_seq_length,
            **arguments,
        )
        train = lazy_dataset(samples, planned_rows(run, data, batch_size(settings)) + 1)
        evaluation = lazy_dataset(heldout, len(heldout))
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process uses one GPU, however many it sees
    from transformers import TrainerCallback

    padded = copy.copy(collator)  # a measured loss is a mean over batches: they stay as they were
    if settings.padding_free:
        collator.packed_for = precision.engine
        if precision.engine == "transformers":
            use_packed_attention(model)
    if settings.compile_layers:
        compile_layers(model)

    class StageTrainer(base):
        """The engine's trainer with this pipeline's order of rows and learning rates."""

        def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            trained, self.data_collator = self.data_collator, padded
            try:
                return super().get_eval_dataloader(*args, **kwargs)
            finally:
                self.data_collator = trained

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochSampler:
            return sampler

        def create_optimizer(self, model: Any = None) -> Any:
            if precision.engine == "unsloth":  # its own has the same two groups
                return super().create_optimizer() if model is None else super().create_optimizer(model)
            if self.optimizer is None:
                self.optimizer = optimizer_with_embedding_rate(self.model, self.args)
            return self.optimizer

    class Continued(TrainerCallback):
        """Tells the order its epoch: the trainer's own word gets lost where several processes skip what was trained."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sampler.set_epoch(state.global_step // math.ceil(sampler.rows / batch_size(settings)))

    return StageTrainer(
        callbacks=[Continued()],
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation if measured else None,
        data_collator=collator,
        processing_class=data.tokenizer,
    )


def compile_layers(model: Any) -> None:
    """Compile each of a model's layers, in place, for rows of any length; the first step takes a minute longer."""
    for module in model.modules():
        if hasattr(module, "self_attn") and hasattr(module, "mlp"):
            module.compile(dynamic=True)


class PromptRows:
    """Prompts of the samples: row -> {"prompt": text, "key": view}, for trl's GRPOTrainer.

    Args:
        data: gives the samples.
        chosen: rows of the first epoch that are used, int (rows,); None: all. Each further epoch holds the same puzzles
            in the same symmetries, with colours and orders of its own.
    """

    def __init__(self, data: StageData, chosen: np.ndarray | None = None):
        """See the class."""
        self.data, self.chosen = data, chosen

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number; a prompt leaves room for its reply within the longest row."""
        if self.chosen is not None:
            epochs, places = np.divmod(np.asarray(rows, dtype=np.int64), len(self.chosen))
            rows = (epochs * len(self.data.samples) + self.chosen[places]).tolist()
        keys = [row["key"] for row in self.data.samples.__getitems__(rows)]
        tasks = [self.data.split.train.fmt_task(key, **self.data.format) for key in keys]
        return [{"prompt": task["input"], "key": task["key"]} for task in tasks]


def report_prompts(run: StageRun, data: StageData, max_completion_length: int) -> None:
    """Print one prompt, how many there are and how long prompts and completions may be."""
    settings = run.settings
    completions = batch_size(settings)
    row = PromptRows(data).__getitems__([0])[0]
    print(f"key {row['key']}\n{row['prompt']}")
    print(
        f"{len(data.samples):,} prompts, with their replies up to {settings.max_seq_length} tokens; completions of up "
        f"to {max_completion_length}; a step: {completions // settings.num_generations} prompts x "
        f"{settings.num_generations} completions; {settings.max_steps} steps"
    )


def grpo_trainer(
    model: Any,
    run: StageRun,
    data: StageData,
    reward_functions: list[Callable[..., Any]],
    *,
    reward_weights: list[float],
    max_completion_length: int,
    chosen: np.ndarray | None = None,
) -> Any:
    """trl's GRPOTrainer (patched by Unsloth on its engine) on the prompts of the samples.

    Args:
        model: a peft model.
        run: settings, precision and folders.
        data: prompts and tokenizer.
        reward_functions: each takes `completion_ids` and `key` and returns a number for each completion.
        reward_weights: one for each function; 0 only logs.
        max_completion_length: tokens of the longest reply.
        chosen: rows of the first epoch that are trained on, see `PromptRows`; None: all.
    """
    from trl import GRPOConfig, GRPOTrainer

    settings, precision = run.settings, run.precision
    arguments = GRPOConfig(
        **common_arguments(run),
        num_generations=settings.num_generations,
        max_completion_length=max_completion_length,
        temperature=settings.temperature,
        beta=settings.beta,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss_type,
        reward_weights=reward_weights,
        mask_truncated_completions=False,  # a reply without an end earns nothing: it shall be unlearned, not overlooked
        use_vllm=settings.use_vllm,
        # Its cache is sized by it; a prompt fits max_seq_length with its own reply, not with the longest one.
        vllm_max_model_length=settings.max_seq_length + max_completion_length if settings.use_vllm else None,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process uses one GPU, however many it sees
    arguments.embedding_learning_rate = settings.embedding_learning_rate
    optimizer = None  # trl makes it
    if set(settings.target_modules) & set(EMBEDDING_MODULES):
        optimizer = optimizer_with_embedding_rate(model, arguments)
    rollouts = None  # trl samples by transformers' generate
    if settings.fast_rollouts:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # trl says of its rollout_func that it may change
        rollouts = make_rollouts(
            model, data.tokenizer, dtype=precision.torch_dtype, max_new_tokens=max_completion_length,
            temperature=settings.temperature, seed=settings.seed,
        )  # fmt: skip
    prompts_per_step = batch_size(settings) // settings.num_generations
    rows = planned_rows(run, data, prompts_per_step)
    if chosen is not None:  # as many rounds as the steps take: trl leaves a last, short batch of prompts out
        rows = len(chosen) * math.ceil(settings.max_steps * prompts_per_step / len(chosen))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_functions,
        rollout_func=rollouts,
        args=arguments,
        train_dataset=lazy_dataset(PromptRows(data, chosen), rows),
        optimizers=(optimizer, None),
        processing_class=data.tokenizer,
    )
    if precision.engine == "transformers":
        train_in_float32(trainer.model)  # trl rounds the trainable weights of a 4-bit base to bfloat16
    return trainer


def optimizer_with_embedding_rate(model: Any, arguments: Any) -> Any:
    """An optimizer with Unsloth's two groups: fully trained embeddings at their own rate, LoRA at the main one.

    Args:
        model: a peft model.
        arguments: of a trainer, with `embedding_learning_rate`.
    """
    from transformers import Trainer

    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".modules_to_save." in name].append(parameter)
    rates = {False: arguments.learning_rate, True: arguments.embedding_learning_rate}
    optimizer = cls(
        [
            {"params": parameters, "lr": rates[embedding], "weight_decay": arguments.weight_decay}
            for embedding, parameters in groups.items()
            if parameters
        ],
        **options,
    )
    if options.get("optim_bits") == 8:
        # As in transformers and Unsloth: an embedding's optimizer state stays in 32 bits.
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if type(module).__name__ == "Embedding":
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def common_arguments(run: StageRun) -> dict[str, Any]:
    """Arguments that every trainer of the pipeline gets, in transformers' names."""
    import torch

    settings, precision = run.settings, run.precision
    size, accumulation = divide_batch(settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    arguments = {
        "output_dir": str(run.work),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # transformers 5 reads a number below 1 as a share of all steps
        "optim": settings.optim,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "use_cpu": not torch.cuda.is_available(),
        "seed": settings.seed,
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        # By the clock unless a number of steps is given, and at the last step; run_guards.guard keeps the newest.
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "remove_unused_columns": False,  # the collator reads reply_spans and key, the reward reads key
        "dataloader_num_workers": settings.dataloader_num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "run_name": run.lora.name,  # what W&B and others call the run
        "report_to": [] if settings.report_to == "none" else settings.report_to.split(","),
    }
    if process_count() > 1:
        arguments["ddp_find_unused_parameters"] = False  # every step uses all of them
    if precision.engine == "transformers" or process_count() > 1:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def check_arguments(run: StageRun) -> None:
    """Let transformers check what it knows best (schedules, optimizers, reporters), before a model is loaded.

    Raises:
        ValueError: a value that no trainer would take.
    """
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    divide_batch(run.settings.per_device_train_batch_size, run.settings.gradient_accumulation_steps)
    if run.settings.compile_layers and run.precision.engine == "unsloth":
        raise ValueError("--compile_layers is for --engine transformers: Unsloth has compiled parts of its own")
    for name, known, usual in (
        ("optim", OptimizerNames, ["adamw_8bit", "adamw_torch"]),
        ("lr_scheduler_type", SchedulerType, ["cosine", "linear"]),
    ):
        value, names = getattr(run.settings, name), [str(member.value) for member in known]
        if value not in names:
            near = ", ".join(difflib.get_close_matches(value, names) or usual)
            raise ValueError(f"--{name} {value}: expected a name that transformers knows, such as {near}")
    try:
        arguments = TrainingArguments(**common_arguments(run))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # says if its package is missing
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"--report_to {run.settings.report_to}: {str(error).splitlines()[0][:300]}") from None


def watch(trainer: Any, run: StageRun, measure: Callable[[], dict[str, float]] | None) -> None:
    """Add tokens/s and measurements on held-out puzzles to a trainer's logs, and keep all of them in metrics.jsonl.

    Args:
        trainer: any trainer of the pipeline.
        run: gives the folder and the intervals.
        measure: called every `eval_steps` steps and at the end; its numbers are logged.
    """
    from transformers import TrainerCallback

    class Metrics(TrainerCallback):
        """Adds to the logs and keeps them."""

        def __init__(self) -> None:
            self.path = run.work / "metrics.jsonl"
            self.seen: tuple[float, int] | None = None
            self.paused = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.path.is_file() and is_main():
                # A continued run repeats the steps after its checkpoint: their lines are written anew.
                kept = [r for r in read_metrics(self.path) if r["step"] <= state.global_step and state.global_step]
                number = len(list(run.work.glob("metrics-*.jsonl")))
                shutil.copy(self.path, run.work / f"metrics-{number}.jsonl")
                beside = run.work / "metrics.tmp"  # a run that is killed here loses no line
                beside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
                beside.replace(self.path)
            self.seen = (time.perf_counter(), state.num_input_tokens_seen)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            logs = logs if logs is not None else {}
            now, tokens = time.perf_counter(), state.num_input_tokens_seen
            begin, before = self.seen or (now, tokens)
            if "loss" in logs and tokens > before:
                logs["tokens_per_s"] = round((tokens - before) / max(1e-9, now - begin - self.paused), 1)
                self.seen, self.paused = (now, tokens), 0.0
            if not is_main():
                return
            record = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            # The time of a measurement is not training time.
            self.paused += (metrics or {}).get("eval_runtime", 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = state.global_step == state.max_steps
            if measure is not None and (last or state.global_step % run.settings.eval_steps == 0):
                begin = time.perf_counter()
                numbers = measure()
                self.paused += time.perf_counter() - begin
                state.log_history.append({**numbers, "step": state.global_step})
                # Not Trainer.log: trl's would close its averages of the step here.
                trainer.callback_handler.on_log(args, state, control, numbers)  # sets should_log to False
            if last:  # also where the intervals do not divide the steps
                control.should_log = True
                control.should_evaluate = args.eval_strategy != "no"

    # First, so that what it adds reaches the console and the reporters, which come after it.
    trainer.callback_handler.callbacks.insert(0, Metrics())


def _plain(value: Any) -> Any:
    # JSON has no NaN and numpy's and torch's scalars are no Python numbers.
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def heldout_measure(model: Any, run: StageRun, data: StageData) -> Callable[[], dict[str, float]] | None:
    """A function that decodes held-out puzzles greedily and returns the share solved; None if there are none."""
    from inference_tools import exact_match

    settings = run.settings
    prompts = data.prompts(settings.eval_puzzles, settings.max_seq_length) if settings.eval_puzzles else []
    if not prompts or not settings.eval_steps:
        return None
    size, own = settings.per_device_eval_batch_size, share(prompts)

    def measure() -> dict[str, float]:
        if len(own) == len(prompts):
            return exact_match(model, run.precision.engine, data.tokenizer, data.heldout, own, batch_size=size)
        numbers = {}
        if own:
            numbers = exact_match(model, run.precision.engine, data.tokenizer, data.heldout, own, batch_size=size)
        parts = gather((len(own), numbers))
        names = parts[0][1]  # the main process always has a part
        return {n: sum(count * part[n] for count, part in parts if count) / len(prompts) for n in names}

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# Train, then merge


class StageRun:
    """One run of a stage: what is there already, what it starts from, training, saving, merging.

    Args:
        stage: names.
        settings: resolved settings.

    Attributes:
        precision: engine and formats of the training.
        parent: what training starts from (None if the adapter is there already).
        to_prepare: the folder of the prepared base if `begin` has to make it, else None.
        to_move: what `begin` moves aside first (--overwrite).
        made_from: name and fingerprint of the parent as training found it.
        work: folder of checkpoints and logs.
    """

    def __init__(self, stage: Stage, settings: RunSettings):
        """Look at what is there, without writing; a user's mistake ends the program with one message."""
        self.stage, self.settings = stage, settings
        self.lora, self.merged, self.work = stage.lora(settings), stage.merged(settings), stage.checkpoints(settings)
        self.parent: Path | str | None = None
        self.to_prepare: Path | None = None
        self.to_move: list[Path] = []
        self.made_from: dict[str, str] = {}
        self.lock = OutputLock(Path(settings.output_dir), stage.script)
        with user_errors():
            self.precision = resolve_precision(settings.engine, settings.dtype, settings.load_in_4bit)
            if self._is_trained():
                print(f"{self.lora} is there: training skipped")
                return
            if self.precision.engine == "unsloth":
                import_unsloth()
            check_arguments(self)
            self.parent = find_parent(stage, settings, without_prepared=stage.prepared(settings) in self.to_move)
            if stage.parent == "prepared" and self.parent == _as_given(settings.base_model):
                self.to_prepare = stage.prepared(settings)
            four_bit = ", base in 4 bits" if self.precision.load_in_4bit else ""
            several = f", {process_count()} processes" if process_count() > 1 else ""
            formats = f"{self.precision.engine}, {self.precision.dtype}{four_bit}{several}"
            print(f"{stage.script}: {self.parent} -> {self.lora} ({formats})")
            print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
            if self.precision.load_in_4bit and read_manifest(self.parent).get("merged_onto") == "quantised":
                print(
                    "note: the parent was merged onto its quantised base and is quantised again here, which rounds "
                    "small changes away; merged with --merge_base original it keeps them (benchmarks/README.md)"
                )

    def _is_trained(self) -> bool:
        # Whether the adapter is there and is what these settings make. With --overwrite, notes what has to go aside.
        stage, settings = self.stage, self.settings
        overwrite = "--overwrite moves it aside (nothing is deleted) and makes it anew"
        if stage.parent == "prepared" and stage.prepared(settings).exists():
            prepared = stage.prepared(settings)
            damage = find_damage(prepared)
            problem = f"{prepared} is damaged: {damage}" if damage else stale_base(prepared, settings)
            if problem and not settings.overwrite:
                raise ValueError(problem + ("; --overwrite moves it aside and prepares it anew" if damage else ""))
            if problem:
                self.to_move = existing([self.merged, self.work, self.lora, prepared])
                return False
        if not self.lora.exists():
            if not self.merged.exists():
                return False
            if not settings.overwrite:
                raise ValueError(
                    f"{self.merged} is there without {self.lora}: bring that back, or use another --output_dir; "
                    "--overwrite trains the adapter again"
                )
            return False  # made again, from its last checkpoint if that is there; the merge may still fit it then
        damage = find_damage(self.lora, "adapter")
        problem = f"is damaged: {damage}" if damage else self._outdated()
        if problem and not settings.overwrite:
            raise ValueError(f"{self.lora} {problem}; {overwrite}")
        if problem:
            print(f"{self.lora} {problem}: it will be moved aside")
            # The checkpoints and the merge of a damaged adapter are still good: it is made again from the last of them.
            self.to_move = [self.lora] if damage else existing([self.merged, self.work, self.lora])
        return not problem

    def _outdated(self) -> str | None:
        """Why the adapter is not what this run would train, as words; None if it is."""
        recorded = read_manifest(self.lora)
        if not recorded.get("files"):  # made elsewhere: there is nothing to compare with
            return None
        parent = Path(self.settings.base_model or "") if self.stage.parent != "prepared" else Path("")
        parent = parent if parent != Path("") else self.stage.default_parent(self.settings)
        before = recorded.get("made_from", {})
        if parent.is_dir() and fingerprint(parent) not in before.values():
            return f"was trained from another model than the one that is in {parent} now"
        if not parent.exists() and self.settings.base_model and self.stage.parent != "prepared":
            if absolute_reference(parent) not in before and str(Path(parent).resolve()) not in before:
                return f"was trained from {', '.join(before)}, not from {parent}"
        earlier = find_outdated(self.lora)
        if earlier:
            return f"rests on something that has changed ({earlier})"
        named = self.settings.engine, self.settings.dtype, self.settings.load_in_4bit
        asked = {
            name: value
            for name, flag, value in zip(asdict(self.precision), named, asdict(self.precision).values(), strict=True)
            if flag not in ("auto", None)
        }
        data = None
        if Path(self.settings.dataset_dir).is_dir():
            data = load_split(self.settings, quiet=True).train.content_hash()
        changed = changed_settings(recorded, self.settings, asked, data)
        return f"was trained with other settings: {', '.join(changed)}" if changed else None

    def needs_training(self) -> bool:
        """Whether the adapter is not there yet."""
        return self.parent is not None

    def begin(self, data: StageData) -> None:
        """The last checks; end here in a dry run, else take the output folder and make the base if need be.

        Args:
            data: what is trained on; checkpoints of a run on other data, or with other settings, are refused.
        """
        with user_errors():
            self._check_checkpoints(data)
            self._check_machine(data.tokenizer)
            if self.settings.dry_run:
                print("dry run: settings, data, model folder and masks are fine")
                sys.exit(0)
            wait_for_everyone()  # all have seen what is there before anything changes
            if is_main():
                self.lock.acquire()
                try:
                    self._take_over(data)
                except BaseException:
                    self.lock.release()
                    raise
            wait_for_everyone()
            if self.to_prepare is not None:  # the main process has made it
                self.parent, self.to_prepare = self.to_prepare, None

    def _take_over(self, data: StageData) -> None:
        # The first things that are written, once the output folder is this run's.
        for folder in self.to_move:
            move_aside(folder)
        if self.lora.exists():
            raise FileExistsError(f"{self.lora} was made by another run meanwhile: run the command again")
        self.work.mkdir(parents=True, exist_ok=True)
        if self.to_prepare is not None:
            if self.to_prepare.exists():
                raise FileExistsError(f"{self.to_prepare} was made by another run meanwhile: run the command again")
            self._prepare(self.parent, self.to_prepare)
            self.parent, self.to_prepare = self.to_prepare, None
            moved = len(self.to_move)
            self._check_checkpoints(data)  # now that the base can be compared too
            for folder in self.to_move[moved:]:
                move_aside(folder)
            self.work.mkdir(exist_ok=True)
        self.made_from = made_from(self.parent, self.lora)
        self._write_course(data)

    def _check_checkpoints(self, data: StageData) -> None:
        # What changes the course of the training must be what the checkpoints were made with.
        path = self.work / COURSE
        if self.work in self.to_move or not path.is_file() or not complete_checkpoints(self.work, quiet=True):
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            course = self._course(data)
            # A setting that an earlier version did not have has its default now, which is what it did.
            changed = sorted(name for name in course if name in before and before[name] != course[name])
        except (ValueError, TypeError):
            changed = [f"{path} cannot be read"]
        if not changed:
            return
        problem = f"{self.work} holds checkpoints of a run with other settings ({', '.join(changed)})"
        if not self.settings.overwrite:
            raise ValueError(f"{problem}: use those, or --overwrite, which moves them aside and starts anew")
        print(f"{problem}: it will be moved aside")
        self.to_move.append(self.work)

    def _check_machine(self, tokenizer: Any) -> None:
        # Whether there is room for what will be written, and memory for the weights at the very least.
        from transformers import AutoConfig

        settings, precision = self.settings, self.precision
        there = complete_checkpoints(self.work, quiet=True)
        counts = count_weights(
            AutoConfig.from_pretrained(str(self.parent), trust_remote_code=False),
            target_modules=settings.target_modules,
            r=settings.lora_r,
            vocabulary=None if self.to_prepare is None or settings.full_vocab else len(tokenizer),
        )
        best = settings.save_total_limit + 1 if getattr(settings, "collapse_guard", False) else 0
        disk = disk_needs(
            counts,
            optim=settings.optim,
            checkpoints=0 if settings.save_steps == 0 or _is_last(there) else settings.save_total_limit,
            checkpoints_there=len(there),
            best=max(0, best - len(list(self.work.glob("best-*.safetensors")))),
            prepared=self.to_prepare is not None,
        )
        memory = memory_needs(counts, **asdict(precision), optim=settings.optim, processes=process_count())
        free = read_free(settings.output_dir)
        if free.memory_name == "main memory":
            free = replace(free, memory=free.memory // process_count())  # each has a copy of the model
        # What a killed run left half-written makes room.
        left = [self.lora.with_name(self.lora.name + INCOMPLETE), self.merged.with_name(self.merged.name + INCOMPLETE)]
        left += [path for path in self.work.glob("checkpoint-*") if path not in there]
        size = sum(path.stat().st_size for folder in left for path in folder.rglob("*") if path.is_file())
        shortages = find_shortages([disk, *memory], replace(free, disk=free.disk + size))
        if shortages:
            raise ValueError("\n".join(shortages))

    def _course(self, data: StageData) -> dict[str, Any]:
        course = course_settings(asdict(self.settings)) | {
            "precision": asdict(self.precision),
            "puzzles": data.split.train.content_hash(),
        }
        if self.to_prepare is None:
            course["the model that it starts from"] = fingerprint(self.parent)
        return json.loads(json.dumps(course))

    def _write_course(self, data: StageData) -> None:
        beside = (self.work / COURSE).with_suffix(".tmp")
        beside.write_text(json.dumps(self._course(data), indent=2) + "\n", encoding="utf-8")
        flush(beside)
        beside.replace(self.work / COURSE)

    def _prepare(self, base: Path | str, folder: Path) -> None:
        print(f"preparing {base} -> {folder}")
        with self.machine_errors("preparing the base"), new_folder(folder) as beside:
            done = prepare_base(base, beside, self.settings.full_vocab)
            if Path(base).is_dir():
                done["base_files"] = file_table(Path(base), model_only=True)
            script = self.stage.script
            write_manifest(beside, provenance("prepared", script, self.settings, **done))

    def train(self, trainer: Any, data: StageData) -> None:
        """Train, from the last complete checkpoint of an interrupted run if there is one, and print a summary.

        Args:
            trainer: any trainer of the pipeline.
            data: what it trains on; a checkpoint of a run on other data is refused.
        """
        import torch

        with user_errors():
            checkpoint = self._last_checkpoint()
            if checkpoint is not None:
                refuse_pickles(checkpoint)
        before = {"global_step": 0, "max_steps": -1, "num_input_tokens_seen": 0}
        if checkpoint is not None:
            print(f"continuing from {checkpoint}")
            before = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if _is_over(before):
                # Training was done, only not saved yet. A trainer that resumes here would take one step more.
                with self.machine_errors("loading the checkpoint"):
                    trainer._load_from_checkpoint(str(checkpoint))
                    trainer.state = type(trainer.state)(**before)
                return
        by_the_clock = self.settings.save_steps is None
        with self.machine_errors("training"), StopSignals() as signals:
            guard(
                trainer,
                signals=signals,
                save_seconds=SAVE_SECONDS if by_the_clock else None,
                steps_between_saves_multiple=generation_steps(trainer.args),
                keep=self.settings.save_total_limit,
            )
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        signals.end_if_received(self.work)
        state, seconds = trainer.state, result.metrics.get("train_runtime", 0.0)
        losses = [record["loss"] for record in state.log_history if "loss" in record]
        tokens = state.num_input_tokens_seen - before["num_input_tokens_seen"]
        memory = ""
        if torch.cuda.is_available():
            memory = f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        print(
            f"trained {state.global_step - before['global_step']} steps to step {state.global_step} in "
            f"{format_duration(seconds)}: last loss {losses[-1] if losses else math.nan:.4f}, {tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s{memory}"
        )

    def _last_checkpoint(self) -> Path | None:
        return next(iter(complete_checkpoints(self.work)), None)

    def machine_errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Trouble of the machine in the block becomes one message that says what is safe; see run_guards."""
        return machine_errors(
            doing,
            asdict(self.settings) | {"dtype": self.precision.dtype} if doing == "training" else {},
            folder=self.settings.output_dir,
            checkpoint=self._last_checkpoint,
            artifacts=[self.stage.default_parent(self.settings), self.lora, self.merged],
        )

    def save(self, model: Any, data: StageData, **about: Any) -> None:
        """Write the adapter with its tokenizer, manifest, metrics, curves, and what the trained model answers.

        Of processes that trained together the main one does, and merges; the others end here.

        Args:
            model: the trained peft model.
            data: what it was trained on.
            about: what the manifest shall say besides.
        """
        from report_tools import plot_metrics

        leave()
        made = {
            "data_fingerprint": data.split.train.content_hash(),
            "made_from": self.made_from,
            **about,
        }
        manifest = provenance(self.stage.name, self.stage.script, self.settings, **made)
        with self.machine_errors("saving the adapter"), new_folder(self.lora) as beside:
            save_adapter(model, data.tokenizer, beside, base=self.parent, precision=self.precision, manifest=manifest)
            metrics = self.work / "metrics.jsonl"
            if metrics.is_file():
                shutil.copy(metrics, beside / metrics.name)
                with _worth_less_than_the_training("no picture of the curves"):
                    plot_metrics(metrics, beside / "loss.png")
            with _worth_less_than_the_training("what the trained model answers is not recorded"):
                rows = data.heldout_rows(self.settings.max_seq_length)[:PROBE_ROWS] or make_probe_rows(data.tokenizer)
                record_probe(model, self.precision.engine, data.tokenizer, rows, beside / PROBE)
        print(f"saved {self.lora}")

    def merge(self) -> None:
        """Merge the adapter into its base, unless that is done, and prove that the result is their sum."""
        import gc

        import torch

        leave()
        try:
            with user_errors():
                if self._is_merged():
                    print(f"{self.merged} is there: merge skipped")
                    return
                if self.settings.dry_run:
                    print(f"dry run: {self.lora} would be merged into {self.merged}")
                    return
                self.lock.acquire()
                if self._is_merged():
                    raise FileExistsError(f"{self.merged} was made by another run meanwhile: run the command again")
                parent = self._where_the_parent_is()
                if self.merged.exists():
                    move_aside(self.merged)
            gc.collect()  # the memory of the trained model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            begin = time.perf_counter()
            with self._merge_errors(), self.machine_errors("merging"), new_folder(self.merged) as beside:
                done = merge_and_check(self.lora, beside, base=parent, merge_base=self.settings.merge_base)
                # How the adapter was trained stands in its own manifest; this run's flags had no part in it.
                made = {name: value for name, value in read_manifest(self.lora).items() if name != "files"}
                made |= {"adapter": str(self.lora.resolve()), **done, "base": str(parent)}
                write_manifest(beside, {**made, "made_from": made_from(self.lora, self.merged)})
        finally:
            self.lock.release()
        print(describe_check(done["check"]))
        print(f"saved {self.merged}: merged onto the {done['merged_onto']} base in {time.perf_counter() - begin:.0f} s")
        if done["merged_onto"] == "quantised":
            print(
                "note: a next stage that quantises this model again loses its small changes (benchmarks/README.md); to "
                "keep them, run this again with --merge_base original --overwrite"
            )

    @contextlib.contextmanager
    def _merge_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # an adapter that does not fit its base, or of a kind that cannot be merged
            if os.environ.get("ARC_TRACEBACK"):
                raise
            fail(f"error: {self.lora} cannot be merged: {error}", 2)
        except MergeError as error:
            if os.environ.get("ARC_TRACEBACK"):
                raise
            fail(
                f"error: the merge of {self.lora} failed its proof and was not kept: {error}\n"
                "The adapter is as it was.",
                1,
            )

    def _is_merged(self) -> bool:
        # Whether the merge is there and is that of this adapter onto the base that is asked for.
        if not self.merged.exists():
            return False
        damage, recorded = find_damage(self.merged), read_manifest_or_nothing(self.merged)
        problem = f"is damaged: {damage}" if damage else None
        if not problem and find_outdated(self.merged):
            problem = f"is outdated: {find_outdated(self.merged)}"
        if not problem and "merged_onto" in recorded:
            four_bit = recorded.get("precision", {}).get("load_in_4bit", False)
            onto = "quantised" if self.settings.merge_base == "quantised" and four_bit else "16-bit"
            if recorded["merged_onto"] != onto:
                was = recorded.get("merge_base")
                problem = f"was merged with --merge_base {was}, asked for is {self.settings.merge_base}"
        if problem and not self.settings.overwrite:
            raise ValueError(f"{self.merged} {problem}; --overwrite moves it aside and merges again")
        if problem:
            print(f"{self.merged} {problem}: it is moved aside")
        return not problem

    def _where_the_parent_is(self) -> Path | str:
        # The adapter names its base by an absolute path; a whole output folder may have been moved or copied since.
        if self.parent is not None:
            return self.parent
        for name, recorded in read_manifest(self.lora).get("made_from", {}).items():
            here = self.lora.parent / name
            if here.is_dir() and fingerprint(here) == recorded:
                return here
        from peft import PeftConfig

        named = PeftConfig.from_pretrained(str(self.lora)).base_model_name_or_path
        if Path(named).is_absolute() and not Path(named).is_dir():
            raise FileNotFoundError(f"{self.lora} was trained on {named}, which is not there: bring it back to merge")
        return named


@contextlib.contextmanager
def _worth_less_than_the_training(without: str) -> Iterator[None]:
    # Hours of training must not be lost to a plot, or to a forward pass that a library has changed.
    try:
        yield
    except Exception as error:  # noqa: BLE001
        if os.environ.get("ARC_TRACEBACK"):
            raise
        print(f"note: {without} ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]})")


def _is_last(checkpoints: list[Path]) -> bool:
    # Whether the newest checkpoint is of the training's last step.
    if not checkpoints:
        return False
    state = json.loads((checkpoints[0] / "trainer_state.json").read_text(encoding="utf-8"))
    return _is_over(state)


def _is_over(state: dict[str, Any]) -> bool:
    # Whether a training, by the state of its newest checkpoint, is done or was stopped for a reason (policy_guards).
    guards = (state.get("stateful_callbacks") or {}).values()
    stopped = any(isinstance(kept, dict) and kept.get("reason") for kept in guards)
    return state["global_step"] == state["max_steps"] or stopped


def _as_given(base_model: str | None) -> Path | str | None:
    return Path(base_model) if base_model and Path(base_model).is_dir() else base_model


def import_unsloth() -> None:
    """Import Unsloth before trl, peft and transformers' models: it patches them."""
    import warnings

    with warnings.catch_warnings():
        # The parser of the flags has loaded transformers' top level, which holds nothing that is patched.
        warnings.filterwarnings("ignore", message="WARNING: Unsloth should be imported before")
        import unsloth  # noqa: F401


def lora_options(settings: RunSettings) -> dict[str, Any]:
    """The settings' LoRA as keyword arguments of `add_lora`."""
    return {
        "target_modules": settings.target_modules,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "bias": settings.lora_bias,
        "use_rslora": settings.use_rslora,
        "random_state": settings.random_state,
        "max_seq_length": settings.max_seq_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
