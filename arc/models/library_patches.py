"""Every change that this project makes to other libraries: why, for which versions, and how it is undone.

A patch returns its undo, a function without arguments, or is a context manager. Where a library offers a hook, the
hook is used. Where a library no longer has what a patch replaces, the patch changes nothing. In this order, with the
versions: transformers 5.17, torch 2.11 to 2.13, bitsandbytes 0.50, peft 0.21, Unsloth 2026.10, trl 1.14.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Undo = Callable[[], None]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

UNSLOTH_KERNELS = "unsloth.kernels.fast_lora"  # the module where Unsloth's layers look up UNSLOTH_READER
UNSLOTH_READER = "get_lora_parameters"
_plain_modules: dict[str, Any] = {}  # see `plain_module`


def replace_attribute(owner: Any, name: str, new: Any) -> Undo:
    """Set an attribute of a module or object; the undo changes nothing if something else has replaced it since."""
    existed, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, new)

    def undo() -> None:
        if vars(owner).get(name) is not new:
            return
        if existed:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return undo


def undo_all(undos: Iterable[Undo]) -> Undo:
    """One undo of several, the last one first."""
    stack = contextlib.ExitStack()
    for undo in undos:
        stack.callback(undo)
    return stack.close


def choose_attention(model: Any, name: str, attention: Callable[..., Any], mask: Any = None) -> Undo:
    """Give a model of transformers another attention function.

    Args:
        name: under which transformers knows the function from now on.
        attention: of transformers' interface: gets queries, keys, values and the mask.
        mask: a function that makes the mask; None: the attention gets only masks that the model is called with.

    Raises:
        ValueError: the model computes its attention by itself.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    undo = functools.partial(model.set_attn_implementation, before)
    if model.config._attn_implementation != name:
        undo()
        raise ValueError(f"{model.config.model_type} models do not let their attention be chosen")
    return undo


def skip_document_search(model: Any, is_packed: Callable[[dict[str, Any]], bool]) -> Undo:
    """Keep transformers from searching the positions of a packed row for the borders of its documents.

    The search waits for the device. transformers leaves a mask with four dimensions as it is, so a forward hook gives
    it an empty one; the attention of packed rows does not look at it.

    Args:
        is_packed: tells from the keyword arguments of a forward pass whether its row is packed.
    """

    def add_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if is_packed(kwargs) and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = kwargs["position_ids"].new_zeros((1, 1, 1, 1))
        return args, kwargs

    return model.register_forward_pre_hook(add_mask, with_kwargs=True).remove


def change_train_loader(trainer: Any, change: Callable[[Any], None]) -> Undo:
    """Change a trainer's loader of batches, torch's inside accelerate's, when the trainer makes it.

    transformers makes the loader inside `train` and has no setting for what its processes do first.
    """
    make = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        loader = make()
        change(getattr(loader, "base_dataloader", loader))
        return loader

    return replace_attribute(trainer, "get_train_dataloader", get_train_dataloader)


def use_one_gpu(arguments: Any) -> Undo:
    """Have transformers' TrainingArguments use one GPU: transformers would divide each batch among all that it sees."""
    return replace_attribute(arguments, "_n_gpu", min(1, arguments.n_gpu))


@contextlib.contextmanager
def uncompiled_layers(model: Any) -> Iterator[None]:
    """Run the layers of a model without their compiled code (torch keeps it in a private attribute).

    Layers that were compiled for training would be compiled again for every kind of pass over a cache.
    """
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def keep_4bit_layout(model: Any) -> Undo:
    """Keep 4-bit weights as stored: on CPUs with AVX512-BF16 the first pass repacks them, and gradients are wrong."""
    name = "support_avx512bf16_for_cpu"
    return undo_all(replace_attribute(m, name, False) for m in model.modules() if hasattr(m, name))


def let_run_ahead(optimizer: Any) -> Undo:
    """Keep an 8-bit optimizer of bitsandbytes from waiting for the device after each tensor.

    A stream runs its kernels in the order of their launch, so the waits change no number. Paged optimizers, whose state
    moves between memories, and other optimizers do not change.
    """
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    applies = module is not None and isinstance(optimizer, module.Optimizer8bit) and not optimizer.is_paged
    if not applies or "step" in vars(optimizer):  # "step": patched before
        return undo_all([])
    step = optimizer.step

    def run_ahead(self: Any, closure: Any = None) -> Any:
        undo = replace_attribute(module, "sync_gpu", lambda tensor: None)
        try:
            return step(closure)
        finally:
            undo()

    method = types.MethodType(run_ahead, optimizer)  # torch's schedulers want a method
    return replace_attribute(optimizer, "step", method)


def change_class(modules: Iterable[Any], new: type) -> Undo:
    """Give modules a subclass of their class: peft has no hook for a forward pass that leaves out the base layer's."""
    before = [(module, type(module)) for module in modules]
    for module, _ in before:
        module.__class__ = new

    def undo() -> None:
        for module, old in reversed(before):
            module.__class__ = old

    return undo


def wrap_unsloth_attention(wrap: Wrap) -> Undo:
    """Wrap Unsloth's attention, `run_attention`, in each of Unsloth's modules that imported it by name.

    Args:
        wrap: makes the new function of Unsloth's; gives back one that it has made already.
    """
    name = "run_attention"
    modules = [module for key, module in list(sys.modules.items()) if key.startswith("unsloth.models.")]
    return undo_all(replace_attribute(m, name, wrap(vars(m)[name])) for m in modules if name in vars(m))


def answer_unsloth_lengths(lengths: torch.Tensor, bounds: Any, longest: int) -> None:
    """Tell Unsloth the lengths of a batch's documents, for which it would wait for the device.

    This writes the answer into Unsloth's private table first. Unsloth overwrites it with the next batch.

    Args:
        lengths: int32 (documents,), the tensor that the model is called with.
        bounds, longest: see packing.attend_documents.
    """
    answers = getattr(sys.modules.get("unsloth.utils.packing"), "_PACKED_INFO_CACHE", None)
    if answers is not None:
        answers[lengths.device] = {"seq_lengths": lengths, "result": (lengths, bounds, longest), "inference": False}


def wrap_unsloth_reader(wrap: Wrap) -> Undo | None:
    """Wrap the function by which Unsloth's layers read their adapters, see `wrap_unsloth_attention`.

    Returns:
        The undo; None where this Unsloth reads adapters in another way, or is not loaded.
    """
    kernels = sys.modules.get(UNSLOTH_KERNELS)
    if not hasattr(kernels, UNSLOTH_READER):
        return None
    return replace_attribute(kernels, UNSLOTH_READER, wrap(getattr(kernels, UNSLOTH_READER)))


def plain_class(kind: type) -> type:
    """A model class of transformers as transformers wrote it; Unsloth replaces methods of the classes that it knows."""
    return kind if "unsloth" not in sys.modules else getattr(plain_module(kind.__module__), kind.__name__)


def plain_module(name: str) -> Any:
    """A module as its file has it, beside the one that Unsloth has changed; `forget_plain_modules` is the undo.

    Unsloth keeps no reference to the classes of trl and transformers that it replaces. The file runs again under
    another name in the same package, so that its relative imports work.
    """
    plain = f"{name}_plain"
    if plain not in _plain_modules:
        file = importlib.import_module(name).__file__
        spec = importlib.util.spec_from_file_location(plain, str(file))
        assert spec is not None and spec.loader is not None, f"{file} is no Python file"
        _plain_modules[plain] = sys.modules[plain] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[plain])
    return _plain_modules[plain]


def forget_plain_modules() -> None:
    """Take the modules that `plain_module` has made out of `sys.modules`."""
    while _plain_modules:
        sys.modules.pop(_plain_modules.popitem()[0], None)


@contextlib.contextmanager
def decoding_once(trainer: Any) -> Iterator[None]:
    """Have a trainer decode equal rows once: for its log, trl decodes a group's prompt once a completion."""
    tokenizer = trainer.processing_class
    trainer.processing_class = DecodingOnce(tokenizer)
    try:
        yield
    finally:
        trainer.processing_class = tokenizer


class DecodingOnce:
    """A tokenizer that decodes equal rows once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Tokenise."""
        return self.tokenizer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the tokenizer."""
        return getattr(self.tokenizer, name)

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Texts of token ids: lists of numbers, or a tensor (rows, tokens)."""
        rows = sequences.cpu().numpy() if hasattr(sequences, "cpu") else [np.asarray(row) for row in sequences]
        keys = [row.tobytes() for row in rows]
        different = dict(zip(keys, rows, strict=True))
        decoded = self.tokenizer.batch_decode([row.tolist() for row in different.values()], **options)
        texts = dict(zip(different, decoded, strict=True))
        return [texts[key] for key in keys]
