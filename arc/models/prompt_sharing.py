"""One row for the completions of several prompts, in which each prompt stands once.

GRPO trains on groups: several completions of one prompt, which is many times longer than they are. A row for each would
compute the prompt anew for each; here the completions attend to one copy of it. What comes out is what rows of their
own give, and so are the gradients: those that a prompt receives from its completions add up. The idea is that of
"Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward" (Liu et al. 2025, arXiv:2506.05433).

    row        prompt A without its last token | prompt B ... | last token of A, reply 1 without its last | ...
    attention  within each part, causally; besides, from each reply to its whole prompt
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

LENGTH_STEP = 256  # the longest parts' lengths are given in such steps, so that compiled code seldom sees a new one
MULTIPLE = 8  # of tokens of a row, see packing_tools.pack_rows


class SharedPrompts(NamedTuple):
    """Where the parts of a row are. Bounds are int32 (parts + 1,), from 0 on.

    Args:
        parts: bounds of all parts, prompts first, then replies.
        prompts: bounds of the prompts alone: the first of `parts`.
        owned: bounds, in the row after the prompts, of the replies to each prompt.
        longest: tokens of the longest part, of the longest prompt and of all replies to one prompt, or more.
        tokens: of all prompts.
    """

    parts: torch.Tensor
    prompts: torch.Tensor
    owned: torch.Tensor
    longest: tuple[int, int, int]
    tokens: int


def share_prompts(
    prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]
) -> tuple[dict[str, Any], SharedPrompts, list[int]]:
    """One row of all prompts that differ, and of all replies; the last one is filled up to a multiple of MULTIPLE.

    Args:
        prompts: token ids of each reply's prompt, int64 (tokens,), two at least; equal ones are shared.
        replies: token ids, int64 (tokens,), one at least.

    Returns:
        `input_ids` and `position_ids`, int64 (1, tokens); where its parts are; the order in which the replies stand in
        it. From `SharedPrompts.tokens` on, as many tokens as all replies have are those whose logits predict them.

    Raises:
        ValueError: a prompt or a reply that is too short.
    """
    import torch

    if min(map(len, prompts)) < 2 or min(map(len, replies)) < 1:
        raise ValueError("prompts have to have two tokens or more, and replies one or more")
    groups: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.tobytes(), []).append(number)
    firsts = [prompts[numbers[0]] for numbers in groups.values()]
    order = [number for numbers in groups.values() for number in numbers]
    heads = [prompt[:-1] for prompt in firsts]
    tails = [np.concatenate([prompts[number][-1:], replies[number][:-1]]) for number in order]
    more = -sum(map(len, [*heads, *tails])) % MULTIPLE
    tails[-1] = np.concatenate([tails[-1], np.zeros(more, dtype=np.int64)])
    positions = [np.arange(len(head)) for head in heads]
    positions += [len(prompts[n]) - 1 + np.arange(len(tail)) for n, tail in zip(order, tails, strict=True)]
    head_lengths = np.array([len(head) for head in heads])
    tail_lengths = np.array([len(tail) for tail in tails])
    owners = np.repeat(np.arange(len(heads)), [len(numbers) for numbers in groups.values()])
    owned_lengths = np.bincount(owners, weights=tail_lengths).astype(np.int64)
    lengths = np.concatenate([head_lengths, tail_lengths])
    row = {
        "input_ids": torch.from_numpy(np.concatenate([*heads, *tails]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
    }
    longest = tuple(-(-int(each.max()) // LENGTH_STEP) * LENGTH_STEP for each in (lengths, head_lengths, owned_lengths))
    shared = SharedPrompts(
        _bounds(lengths), _bounds(head_lengths), _bounds(owned_lengths), longest, int(head_lengths.sum())
    )
    return row, shared, order


def _bounds(lengths: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def reply_log_probs(
    model: Any,
    engine: str,
    prompts: Sequence[np.ndarray],
    replies: Sequence[np.ndarray],
    *,
    temperature: float = 1.0,
    width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probability of each token of replies, and the entropy of what it was chosen from, in one pass.

    Args:
        model: a model with packing_tools.use_packed_attention.
        engine: "transformers" or "unsloth".
        prompts: token ids of each reply's prompt, int64 (tokens,).
        replies: token ids, int64 (tokens,).
        temperature: logits are divided by it.
        width: columns of what is returned; default: the longest reply.

    Returns:
        Two float32 (replies, width), 0 after a reply's end; the entropies without a gradient.
    """
    import torch

    logits, rows, columns, places = _logits_of_replies(model, engine, prompts, replies)
    logits = logits.float() / temperature
    targets = np.concatenate(replies).astype(np.int64)
    sent = torch.from_numpy(np.stack([targets, rows, columns, places])).to(logits.device, non_blocking=True)
    log_probs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropies = -(log_probs.exp() * log_probs).sum(-1)
    shape = (len(replies), width or max(map(len, replies)))
    cells = (sent[1], sent[2])
    chosen, entropies = log_probs[sent[3], sent[0]], entropies[sent[3]]
    return chosen.new_zeros(shape).index_put(cells, chosen), entropies.new_zeros(shape).index_put(cells, entropies)


def solution_logits(
    model: Any, engine: str, prompts: Sequence[np.ndarray], solutions: Sequence[np.ndarray]
) -> torch.Tensor:
    """Logits that each token of solutions is chosen from, in one pass.

    Args:
        model, engine: see `reply_log_probs`.
        prompts, solutions: token ids, int64 (tokens,) each.

    Returns:
        (tokens of all solutions, vocabulary), in their order.
    """
    import torch

    logits, _, _, places = _logits_of_replies(model, engine, prompts, solutions)
    return logits[torch.from_numpy(places).to(logits.device)]


def _logits_of_replies(
    model: Any, engine: str, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    # The logits of all places of the row that tokens are chosen from; and of each token of each reply, one reply after
    # the other: the reply's number, the token's column in it, and the place that it is chosen from.

    computed, owner = covering_replies(prompts, replies)
    row, shared, order = share_prompts([prompts[at] for at in computed], [replies[at] for at in computed])
    begins, begin = {}, 0  # of the replies that are computed, in the row after the prompts
    for at in order:
        begins[computed[at]] = begin
        begin += len(replies[computed[at]])
    lengths = np.array([len(reply) for reply in replies])
    rows = np.repeat(np.arange(len(replies)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    places = np.array([begins[number] for number in owner])[rows] + columns
    device = model.get_input_embeddings().weight.device if hasattr(model, "get_input_embeddings") else model.device
    batch = {name: value.to(device, non_blocking=True) for name, value in row.items()}
    batch |= engine_arguments(shared, engine, device)
    kept = row["input_ids"].shape[1] - shared.tokens  # with what fills the row up
    return model(**batch, logits_to_keep=kept, use_cache=False).logits[0, :begin], rows, columns, places


def covering_replies(prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Replies that have to be computed: those of which no longer one to the same prompt has all that they depend on.

    A reply's tokens are chosen after its prompt and the tokens before them; so a reply that is another one up to its
    last token needs no place of its own. Of a group that mostly agrees, few are left.

    Args:
        prompts: token ids of each reply's prompt, int64 (tokens,).
        replies: token ids, int64 (tokens,).

    Returns:
        The numbers of replies that are computed, ascending, and for each reply the number of the one that covers it.
    """
    kept: dict[bytes, list[tuple[int, bytes]]] = {}  # of each prompt: number and tokens of what is computed
    owner = [0] * len(replies)
    for number in sorted(range(len(replies)), key=lambda at: -len(replies[at])):
        tokens = np.asarray(replies[number], dtype=np.int64)
        before, group = tokens[:-1].tobytes(), kept.setdefault(prompts[number].tobytes(), [])
        found = next((at for at, others in group if others.startswith(before)), None)
        if found is None:
            found = number
            group.append((number, tokens.tobytes()))
        owner[number] = found
    return sorted(set(owner)), owner


def engine_arguments(shared: SharedPrompts, engine: str, device: torch.device) -> dict[str, Any]:
    """What a model of either engine is called with besides ids and positions, see packing_tools.use_packed_attention.

    Args:
        shared: where the parts of the row are.
        engine: "transformers" or "unsloth".
        device: of the model.
    """
    moved = shared._replace(
        parts=shared.parts.to(device, non_blocking=True),
        prompts=shared.prompts.to(device, non_blocking=True),
        owned=shared.owned.to(device, non_blocking=True),
    )
    if engine == "unsloth":
        lengths = (shared.parts[1:] - shared.parts[:-1]).to(device, non_blocking=True)
        return {"packed_seq_lengths": lengths, "packed_documents": (moved, shared.longest[0])}
    return {"shared_prompts": moved}


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attend_shared(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shared: SharedPrompts, scaling: float | None = None,
    *, kernel: bool,
) -> torch.Tensor:  # fmt: skip
    """Causal attention within each part of a row, and of each reply to its prompt.

    Args:
        query: (1, query heads, tokens, size).
        key, value: (1, heads, tokens, size).
        shared: where the parts are.
        scaling: of the scores; default: 1 / sqrt(size).
        kernel: use PyTorch's flash attention, see packing_tools.has_document_kernel.

    Returns:
        (1, tokens, query heads, size).
    """
    if kernel:
        import torch

        if not torch.compiler.is_compiling():
            define_operators()
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        attend = torch.ops.arc_finetuning.attend_shared
        return attend(q, k, v, *shared[:3], shared.longest, shared.tokens, scaling)[0][None]
    return _attend_part_by_part(query, key, value, shared, scaling)


def _attend_part_by_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shared: SharedPrompts, scaling: float | None
) -> torch.Tensor:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    bounds, owned = shared.parts.tolist(), shared.owned.tolist()
    count = len(shared.prompts) - 1
    found = []
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own, before = slice(begin, end), slice(begin, begin)
        if number >= count:
            owner = int(np.searchsorted(owned, begin - shared.tokens, side="right")) - 1
            before = slice(bounds[owner], bounds[owner + 1])
        keys, values = (torch.cat([part[:, :, before], part[:, :, own]], dim=2) for part in (key, value))
        places = torch.arange(keys.shape[2], device=query.device)
        seen = places <= (places[-1] - (end - begin) + 1 + torch.arange(end - begin, device=query.device))[:, None]
        found.append(
            scaled_dot_product_attention(
                query[:, :, own], keys, values, attn_mask=seen, scale=scaling,
                enable_gqa=query.shape[1] > key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(found, dim=2).transpose(1, 2).contiguous()


def _kernels() -> tuple[Any, Any]:
    import torch

    return torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


@functools.cache
def define_operators() -> None:
    """Make known to torch, once, what `attend_shared` calls: to compiled layers it is one operation, whatever the row.

    Two calls of the kernel: each part to itself, and the replies to their prompts. Softmax over both together is the
    mean of the two results, weighted by their sums of exponentials, whose logarithms the kernel gives. In the backward
    pass each call gives its own share of the gradients, which depend on the whole result and the whole sum only.
    """
    import torch  # here: it is not imported with this file
    from torch import library

    rest = "Tensor parts, Tensor prompts, Tensor owned, SymInt[] longest, SymInt tokens, float? scaling"
    name = "arc_finetuning::attend_shared"

    @library.custom_op(name, mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {rest}) -> (Tensor, Tensor)")
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: torch.Tensor, prompts: torch.Tensor,
        owned: torch.Tensor, longest: Sequence[int], tokens: int, scaling: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        attend, _ = _kernels()
        own, own_sum = attend(q, k, v, parts, parts, longest[0], longest[0], 0.0, True, False, scale=scaling)[:2]
        to_prompt, prompt_sum = attend(
            q[tokens:], k[:tokens], v[:tokens], owned, prompts, longest[2], longest[1], 0.0, False, False, scale=scaling
        )[:2]
        both = torch.logaddexp(own_sum[:, tokens:], prompt_sum)  # (heads, tokens of replies)
        share = torch.exp(prompt_sum - both).t()[..., None]
        mixed = torch.lerp(own[tokens:].float(), to_prompt.float(), share).to(own.dtype)
        return torch.cat([own[:tokens], mixed]), torch.cat([own_sum[:, :tokens], both], dim=1)

    @forward.register_fake
    def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @library.custom_op(
        f"{name}_backward", mutates_args=(),
        schema=f"(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, {rest})"
        " -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    def backward(
        gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        sums: torch.Tensor, parts: torch.Tensor, prompts: torch.Tensor, owned: torch.Tensor, longest: Sequence[int],
        tokens: int, scaling: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        _, back = _kernels()
        gradient = gradient.contiguous()
        # The states of a random generator, for a dropout that there is not.
        state, offset = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
        dq, dk, dv = back(
            gradient, q, k, v, out, sums, parts, parts, longest[0], longest[0], 0.0, True, state, offset, scale=scaling
        )
        more_q, more_k, more_v = back(
            gradient[tokens:], q[tokens:], k[:tokens], v[:tokens], out[tokens:], sums[:, tokens:].contiguous(),
            owned, prompts, longest[2], longest[1], 0.0, False, state, offset, scale=scaling,
        )  # fmt: skip
        dq[tokens:] += more_q
        dk[:tokens] += more_k
        dv[:tokens] += more_v
        return dq.contiguous(), dk.contiguous(), dv.contiguous()  # as q, k and v need not be

    @backward.register_fake
    def _(gradient: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(each.new_empty(each.shape) for each in inputs[:3])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        q, k, v, parts, prompts, owned, *ctx.others = inputs
        ctx.save_for_backward(q, k, v, *output, parts, prompts, owned)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx: Any, gradient: torch.Tensor, of_sums: Any) -> tuple[Any, ...]:
        return *backward(gradient, *ctx.saved_tensors, *ctx.others), *[None] * 6

    forward.register_autograd(gradients, setup_context=keep)
