"""How a step is computed on this machine: samples of a forward pass, checkpointing, packing, compiling; and how long.

What a step trains on is decided by the settings alone: so many samples, in an order, with a loss that is a sum over
their tokens. Into how many forward passes they are divided makes no difference to what is learned and much to the time:
small passes of a 1B model keep a large GPU waiting for its host. `plan_batches` tries passes of the model that will be
trained, takes the largest that fit the free memory, and times them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.models.collator import InputMaskingDataCollator
from arc.models.library_patches import let_run_ahead
from arc.models.loading import Precision
from arc.models.lora import set_gradient_checkpointing
from arc.models.packing import IGNORE_INDEX
from arc.runs.needs import count_weights, format_duration, optimizer_bytes
from arc.runs.processes import agree, divide_batch, process_count
from arc.runs.troubles import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from arc.puzzles.encoding import TrainingSamples
    from arc.runs.settings import RunSettings
    from arc.training.run import StageRun

FILLED = 0.92  # of the GPU's free memory, at most: what is left is for fragments and for other libraries
COMPILE_FROM = 600.0  # seconds of training from which compiling pays: it takes a minute, and saves a third of the time
TIMED_BATCHES = 3  # of samples as they are trained on, after a round that is not timed
TIMED_ROUNDS = 2  # the shortest counts
FEW_WEIGHTS = 2**26  # an optimizer is timed on all of so few: copies, gradients and state take 1 GiB
Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchPlan:
    """How a step is computed.

    Args:
        micro_batch_size: samples of a forward pass, of each process.
        passes: forward passes of a step, of each process.
        gradient_checkpointing: activations are recomputed in the backward pass.
        padding_free: the samples of a pass stand in one row, see arc/models/packing.py.
        compile_layers: each layer is compiled.
        peak_bytes: GPU memory of the longest pass with what training will add to it; None: not tried.
        seconds_per_step: of all passes and the optimizer; None: not timed.
        loader_processes: processes that make batches ahead; 0: the main one does.
    """

    micro_batch_size: int
    passes: int
    gradient_checkpointing: bool
    padding_free: bool
    compile_layers: bool = False
    peak_bytes: int | None = None
    seconds_per_step: float | None = None
    loader_processes: int = 0

    def choice(self) -> dict[str, Any]:
        """What was chosen, without what was measured: for checkpoints and manifests, which a rerun makes alike."""
        measured = ("peak_bytes", "seconds_per_step")
        return {name: value for name, value in asdict(self).items() if name not in measured}

    def describe(self, steps: int, rows: str = "samples") -> str:
        """One line about the plan, and about how long that many steps take.

        Args:
            steps: of the training.
            rows: what a batch has, in the plural.
        """
        size = self.micro_batch_size
        parts = [
            f"a step: {self.passes} forward {'passes' if self.passes > 1 else 'pass'} of {size} "
            f"{rows if size > 1 else rows[:-1]}",
            "without padding" if self.padding_free else "padded",
            f"{'with' if self.gradient_checkpointing else 'without'} gradient checkpointing",
        ]
        if self.compile_layers:
            parts.append("layers compiled")
        if self.loader_processes:
            parts.append(f"batches made by {self.loader_processes} more processes")
        if process_count() > 1:
            parts.append(f"in each of {process_count()} processes")
        text = ", ".join(parts)
        if self.peak_bytes is not None:
            text += f"; at most {self.peak_bytes / 2**30:.1f} GiB of GPU memory"
        if self.seconds_per_step is not None:
            seconds = self.seconds_per_step
            text += f"; {seconds:.3g} s a step, estimated time of {steps:,} steps: {format_duration(seconds * steps)}"
        return text


def plan_batches(trial: Trial, *, steps: int, kept: BatchPlan | None = None) -> BatchPlan:
    """Decide how a step is computed, by trying passes of the model; the model is left as the plan says.

    On CUDA the largest division of a step that fits the free memory is taken, without checkpointing where it fits so;
    where it does not, the faster of the two. Settings that say how are obeyed. On a CPU nothing is tried but the time,
    where it is wanted (see `Trial`): a step is divided as the settings say. All processes of a run decide alike.

    Args:
        trial: passes of the model that is about to be trained.
        steps: of the training that is ahead, for whether compiling pays.
        kept: the plan of the checkpoint that the training continues from: kept to if it fits and no setting says
            otherwise.

    Raises:
        torch.OutOfMemoryError: not even one sample fits.
    """
    import torch

    model, settings, engine = trial.model, trial.run.settings, trial.run.precision.engine
    own = settings.samples_per_step // process_count()
    compile_setting = settings.compile_layers
    cuda, compiled = torch.cuda.is_available(), bool(compile_setting)
    if compiled:
        compile_layers(model)

    def fits(size: int, on: bool, must: bool) -> tuple[int | None, bool]:
        set_gradient_checkpointing(model, engine, on)
        return trial.fits(size, own // size, must)

    sizes, checkpointing = choices(settings, own, cuda, kept)
    found = divisions_that_fit(sizes, checkpointing, own, fits) if cuda else [(sizes[0], checkpointing[0], None)]
    may_compile = cuda and engine == "transformers" and compile_setting is None
    plans = [BatchPlan(size, own // size, on, trial.padding_free, compiled, peak) for size, on, peak in found]
    if len(plans) > 1 or may_compile or trial.tells_time:
        for at, plan in enumerate(plans):
            set_gradient_checkpointing(model, engine, plan.gradient_checkpointing)
            plans[at] = replace(plan, seconds_per_step=_slowest(trial.seconds_per_step(plan)))
        plans.sort(key=lambda plan: plan.seconds_per_step)
    best = plans[0]
    set_gradient_checkpointing(model, engine, best.gradient_checkpointing)
    if may_compile and steps * best.seconds_per_step > COMPILE_FROM and not best.gradient_checkpointing:
        best = _compiled_if_faster(model, trial, best)
    trial.release()
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # what is told of the training's memory is the training's
    return best


def choices(
    settings: RunSettings, own: int, cuda: bool, kept: BatchPlan | None = None
) -> tuple[Sequence[int], Sequence[bool]]:
    """Samples of a forward pass, and whether to use checkpointing, that may be chosen among, the best first.

    Args:
        settings: which may say so.
        own: samples of a step, of each process.
        cuda: whether there is a GPU, whose memory can be tried.
        kept: the plan so far, in a run that continues.
    """
    if settings.micro_batch_size is not None:
        sizes = [settings.micro_batch_size]
    elif not cuda:
        sizes = [divide_batch(settings.per_device_train_batch_size, settings.gradient_accumulation_steps)[0]]
    elif kept is not None and own % kept.micro_batch_size == 0:
        sizes = [size for size in divisors(own) if size <= kept.micro_batch_size]
    else:
        sizes = divisors(own)
    if settings.gradient_checkpointing is not None:
        return sizes, [settings.gradient_checkpointing]
    if not cuda:
        return sizes, [True]  # as published: main memory cannot be tried without risk to the whole machine
    return sizes, [True] if kept is not None and kept.gradient_checkpointing else [False, True]


def divisions_that_fit(
    sizes: Sequence[int],
    checkpointing: Sequence[bool],
    own: int,
    fits: Callable[[int, bool, bool], tuple[int | None, bool]],
) -> list[tuple[int, bool, int | None]]:
    """The largest size that fits, for each way of checkpointing of which it is not clear that it is the slower one.

    Args:
        sizes: samples of a forward pass, the largest first.
        checkpointing: False, True or both, in the order in which they are tried.
        own: samples of a step.
        fits: of a size, whether to use checkpointing, and whether it is the last choice, which has to be taken: gives
            the memory in bytes and whether there is as much.

    Returns:
        For each: size, checkpointing and memory.
    """
    found: list[tuple[int, bool, int | None]] = []
    for on in checkpointing:
        for size in sizes:
            must = not found and (size, on) == (sizes[-1], checkpointing[-1])
            peak, good = fits(size, on, must)
            if good:
                found.append((size, on, peak))
                break
        if found and found[-1][0] == own:
            break  # nothing is faster than all at once without recomputing
    return found


def divisors(number: int) -> list[int]:
    """All divisors of a number, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def _compiled_if_faster(model: Any, trial: Trial, plan: BatchPlan) -> BatchPlan:
    begin = time.perf_counter()
    compile_layers(model)
    try:
        seconds = trial.seconds_per_step(plan)
    except Exception as error:  # noqa: BLE001 - no compiler on the machine, or one that cannot cope: not needed
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        print(f"note: the layers cannot be compiled here ({reason}); training goes on without")
        seconds = 1e6  # all processes do without then
    seconds = _slowest(seconds)
    if seconds > plan.seconds_per_step:
        compile_layers(model, undo=True)
        return plan
    print(f"compiled the layers in {format_duration(time.perf_counter() - begin)}")
    return replace(plan, compile_layers=True, seconds_per_step=seconds)


def _slowest(seconds: float) -> float:
    # Of all processes: they wait for each other.
    return agree(round(1e6 * seconds))[0] / 1e6


def compile_layers(model: Any, undo: bool = False) -> None:
    """Compile each of a model's layers, in place, for rows of any length; the first step takes a minute longer.

    Args:
        model: any of transformers with decoder layers.
        undo: be as before.
    """
    for module in model.modules():
        if hasattr(module, "self_attn") and hasattr(module, "mlp"):
            if undo:
                module._compiled_call_impl = None  # what nn.Module.compile sets
            else:
                module.compile(dynamic=True)


def faster_way(plan: BatchPlan, precision: Precision, memory: int) -> str | None:
    """A line about flags that are known to be faster than what was chosen; None where none are.

    Args:
        plan: what was chosen.
        precision: engine and number format.
        memory: of the GPU, in bytes.
    """
    if precision.engine != "unsloth" or not precision.load_in_4bit or not plan.padding_free:
        return None
    if plan.peak_bytes is None or plan.passes > 1 or plan.gradient_checkpointing or memory < 3 * plan.peak_bytes:
        return None  # 16 bits, and kernels that keep more, took 1.6 times the memory
    return (
        "note: --engine transformers --load_in_4bit false is another training, in 16 bits, and faster on a GPU with so "
        "much memory: 1.5 times on one H200 in benchmarks/README.md"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Passes that are tried


class Trial:
    """Forward and backward passes of a model that is about to be trained; they leave no trace.

    What a pass is, subclasses say: `longest`, `typical`, `tokens`, `tokens_per_step` and `loss`.

    Args:
        model: with its adapters, before an optimizer is made.
        run: settings and precision.
        more: bytes of GPU memory that training takes besides the passes, the optimizer and what processes exchange.
    """

    padding_free = False
    tells_time = True  # whether what a step takes is wanted where there is nothing to choose

    def __init__(self, model: Any, run: StageRun, more: int = 0):
        """See the class."""
        self.model, self.run = model, run
        self.device = next(model.parameters()).device
        counts = count_weights(
            model.config, target_modules=run.settings.target_modules, r=run.settings.lora_r, vocabulary=None
        )
        # What training adds to a pass: the optimizer's state, and what processes exchange.
        self.more = more + (0 if "paged" in run.settings.optim else optimizer_bytes(counts, run.settings.optim))
        self.more += 4 * counts.trained if process_count() > 1 else 0

    def longest(self, size: int) -> Any:
        """What a pass of so many samples takes if all are as long as can be."""
        raise NotImplementedError

    def typical(self, size: int) -> list[Any]:
        """What a few passes of so many samples take, as they are trained on."""
        raise NotImplementedError

    def tokens(self, batch: Any) -> int:
        """Tokens of what a pass takes, to compare passes by."""
        raise NotImplementedError

    def tokens_per_step(self, plan: BatchPlan) -> float:
        """Tokens of a step of this process."""
        raise NotImplementedError

    def loss(self, batch: Any) -> torch.Tensor:
        """The forward pass."""
        raise NotImplementedError

    def fits(self, size: int, passes: int, must: bool = False) -> tuple[int | None, bool]:
        """GPU memory in bytes that passes of so many of the longest rows take, and whether all processes have it.

        Args:
            size: rows of a pass.
            passes: of a step: from the second on, the gradients of those before stand beside the activations.
            must: raise what one without the memory gets.
        """
        import torch

        self.release()
        torch.cuda.reset_peak_memory_stats()
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        peak: int | None = None
        try:
            self.passes([self.longest(size)] * min(passes, 2))
            peak = torch.cuda.max_memory_allocated() + self.more
        except RuntimeError as error:
            if not is_out_of_memory(error) or must:
                raise
        self.release()
        good = must or (peak is not None and peak <= FILLED * room)
        return peak, not agree(int(not good))[0]

    def seconds_per_step(self, plan: BatchPlan) -> float:
        """Seconds of all passes of a step in this process, without the optimizer."""
        if self.device.type == "cuda":
            batches = self.typical(plan.micro_batch_size)
            self.passes(batches)  # kernels are compiled for lengths as they come
            timed = batches[1:] or batches
        else:
            timed = self.typical(1)[:1]  # a CPU is as long at each token, however many there are
        # The first passes of a process take longer, and of a GPU's again: until its memory is divided as it is needed.
        seconds = min(self.passes(timed) for _ in range(TIMED_ROUNDS))
        self.release()
        return seconds * self.tokens_per_step(plan) / sum(map(self.tokens, timed))

    def passes(self, batches: Sequence[Any]) -> float:
        """Seconds of forward and backward passes of batches; gradients add up, random numbers are put back."""
        import torch

        precision = self.run.precision
        self.model.train()
        autocast: Callable[[], Any] = nullcontext
        if precision.dtype != "float32" and self.device.type == "cuda":

            def autocast() -> Any:
                return torch.autocast("cuda", precision.torch_dtype)

        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            begin = synchronised_time()
            for batch in batches:
                with autocast():
                    loss = self.loss(batch)
                loss.backward()
            return synchronised_time() - begin

    def release(self) -> None:
        """Give back the gradients, and on CUDA what the allocator keeps."""
        import gc

        import torch

        for parameter in self.model.parameters():
            parameter.grad = None
        gc.collect()  # a pass that ran out of memory may leave cycles that hold activations
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class SupervisedTrial(Trial):
    """Passes of a supervised stage.

    Args:
        model, run: see `Trial`.
        samples: rows and their lengths.
        collator: makes batches, padded or packed.
        order: row numbers of samples, as they are trained on: the first are timed.
    """

    def __init__(
        self,
        model: Any,
        run: StageRun,
        samples: TrainingSamples,
        collator: InputMaskingDataCollator,
        order: Sequence[int],
    ):
        """See the class."""
        super().__init__(model, run)
        self.samples, self.collator, self.order = samples, collator, order
        self.padding_free = collator.packed_for is not None

    def longest(self, size: int) -> Batch:
        """A batch of the longest rows there are."""
        tokens = min(self.run.settings.max_seq_length, int(self.samples.lengths().max()))
        row = uniform_row(tokens, self.collator.mask_first_n_examples, self.model.config.vocab_size)
        return self.collator([row] * size)

    def typical(self, size: int) -> list[Batch]:
        """The first batches."""
        parts = [self.order[at * size : (at + 1) * size] for at in range(1 + TIMED_BATCHES)]
        return [self._batch(rows) for rows in parts if len(rows) == size] or [self._batch(self.order[:1])]

    def _batch(self, rows: Sequence[int]) -> Batch:
        return self.collator(self.samples.__getitems__(list(rows)))

    def tokens(self, batch: Batch) -> int:
        """Without padding."""
        mask = batch.get("attention_mask")
        return int((batch["input_ids"] != self.collator.tokenizer.pad_token_id if mask is None else mask).sum())

    def tokens_per_step(self, plan: BatchPlan) -> float:
        """On average."""
        return float(self.samples.lengths().mean()) * plan.micro_batch_size * plan.passes

    def loss(self, batch: Batch) -> torch.Tensor:
        """The model's own, called as a trainer calls it: for other keywords its layers would be compiled anew."""
        from accelerate.utils import send_to_device

        batch = {**send_to_device(batch, self.device), "use_cache": False}
        if self.run.precision.engine == "transformers":
            batch["num_items_in_batch"] = (batch["labels"] != IGNORE_INDEX).sum()
        return self.model(**batch).loss


def synchronised_time() -> float:
    """The time, in seconds, once the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def uniform_row(tokens: int, masked_replies: int, vocabulary: int) -> dict[str, Any]:
    """A row of random tokens, all of which are learned that can be; for the memory that rows of a length take."""
    bounds = np.arange(masked_replies + 1)
    spans = np.stack([bounds, np.append(bounds[1:], tokens)], axis=1)
    return {"input_ids": np.random.default_rng(0).integers(0, vocabulary, tokens), "reply_spans": spans}


def optimizer_seconds(model: Any, cls: type, options: dict[str, Any], max_norm: float) -> float:
    """Seconds of a step's optimizer, measured on copies of trained weights; the weights stay as they are.

    Args:
        model: with its trainable weights.
        cls, options: of the optimizer.
        max_norm: gradients are clipped to it.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # An eighth that stand together: whole layers, in which large and small matrices are mixed as everywhere. All of a
    # few: as many kernels are started for an eighth of them, which take longer to start than to run.
    few = sum(p.numel() for p in trained) <= FEW_WEIGHTS
    begin = len(trained) // 2
    some = trained if few else trained[begin : begin + max(1, len(trained) // 8)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in some]
    optimizer = cls([{"params": copies}], **options)
    if hasattr(optimizer, "train"):  # schedule-free ones have two modes
        optimizer.train()
    let_run_ahead(optimizer)
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    seconds = []
    for _ in range(1 + TIMED_ROUNDS):  # the first makes the state
        begun = synchronised_time()
        torch.nn.utils.clip_grad_norm_(copies, max_norm)
        optimizer.step()
        seconds.append(synchronised_time() - begun)
    return min(seconds[1:]) * sum(p.numel() for p in trained) / sum(p.numel() for p in copies)
