"""Optimizers of a training: two learning rates, Muon, and how long a step takes."""

from __future__ import annotations

from typing import Any

from arc.models.library_patches import let_run_ahead
from arc.training.trials import TIMED_ROUNDS, synchronised_time

MUON = "muon"  # the only value of --optim that transformers does not know
BESIDE_MUON = "adamw_torch_fused"  # what transformers is told in its place: it steps what Muon does not
FEW_WEIGHTS = 2**26  # an optimizer is timed on all of so few: copies, gradients and state take 1 GiB


def optimizer_class(model: Any, arguments: Any, optim: str | None = None) -> tuple[type, dict[str, Any]]:
    """Class and options of an optimizer, see `optimizer_with_embedding_rate`."""
    from transformers import Trainer

    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if optim == MUON:
        from arc.training.muon import Muon

        cls = Muon  # with AdamW's options
    return cls, options


def optimizer_with_embedding_rate(model: Any, arguments: Any, optim: str | None = None) -> Any:
    """An optimizer with Unsloth's two groups: LoRA at the main learning rate, embeddings (trained in full) at theirs.

    `arguments` are a trainer's, with `embedding_learning_rate`. With `optim` "muon", Muon steps LoRA's matrices; else
    the arguments' optimizer steps all.
    """
    cls, options = optimizer_class(model, arguments, optim)
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".modules_to_save." in name].append(parameter)
    rates = {False: arguments.learning_rate, True: arguments.embedding_learning_rate}
    optimizer = cls(
        [
            {"params": parameters, "lr": rates[embedding], "weight_decay": arguments.weight_decay}
            | ({"use_muon": not embedding} if optim == MUON else {})
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


def optimizer_seconds(model: Any, cls: type, options: dict[str, Any], max_norm: float) -> float:
    """Seconds of one optimizer step with clipping, measured on copies of trained weights, which stay as they are."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A large model: a consecutive eighth of its weights. These are whole layers, with the usual mix of large and small
    # matrices. A small model: all weights, because starting a kernel takes longer there than running it.
    few = sum(p.numel() for p in trained) <= FEW_WEIGHTS
    begin = len(trained) // 2
    timed = trained if few else trained[begin : begin + max(1, len(trained) // 8)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in timed]
    optimizer = cls([{"params": copies}], **options)
    if hasattr(optimizer, "train"):  # schedule-free ones have two modes
        optimizer.train()
    let_run_ahead(optimizer)
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    seconds = []
    for _ in range(1 + TIMED_ROUNDS):  # the first creates the state
        begun = synchronised_time()
        torch.nn.utils.clip_grad_norm_(copies, max_norm)
        optimizer.step()
        seconds.append(synchronised_time() - begun)
    return min(seconds[1:]) * sum(p.numel() for p in trained) / sum(p.numel() for p in copies)
