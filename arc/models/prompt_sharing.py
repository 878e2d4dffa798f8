"""One row for the completions of several prompts, which holds each prompt once.

GRPO trains on groups: several completions of one prompt that is many times longer. Here the completions attend to one
copy of their prompt. Results are those of separate rows: a prompt's gradients from its completions add up.

    row        prompt A without its last token | prompt B ... | last token of A, reply 1 without its last | ...
    attention  causal within each segment; and from each reply to its whole prompt

Source: the idea of "Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward", Liu et al. 2025,
arXiv:2506.05433.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

LENGTH_STEP = 256  # the longest lengths are rounded up to such steps, so that compiled code seldom sees a new one
MULTIPLE = 8  # a row has a multiple of so many tokens, see packing.pack_rows


def round_up(number: int, step: int) -> int:
    """The least multiple of `step` that is not below `number`."""
    return -(-number // step) * step


class SharedPrompts(NamedTuple):
    """The segments of a row, as bounds: int32 (segments + 1,), from 0."""

    parts: torch.Tensor  # of all segments, first the prompts, then the replies
    prompts: torch.Tensor  # of the prompts: the first ones of `parts`
    owned: torch.Tensor  # of the replies to each prompt together, counted from the end of the prompts
    longest: tuple[int, int, int]  # tokens of the longest segment, prompt, and all replies to one prompt, or more
    tokens: int  # of all prompts


def share_prompts(
    prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]
) -> tuple[dict[str, Any], SharedPrompts, list[int]]:
    """One row of all different prompts and all replies; the last reply is padded to a multiple of MULTIPLE.

    Args:
        prompts: token ids of each reply's prompt, int64 (tokens,), two tokens or more each; equal prompts are shared.
        replies: token ids, int64 (tokens,), one token or more each.

    Returns:
        `input_ids` and `position_ids`, int64 (1, tokens); the segments; the order of the replies in the row. The logits
        from `SharedPrompts.tokens` on predict the tokens of the replies, one after the other.

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
    padding = -sum(map(len, [*heads, *tails])) % MULTIPLE
    tails[-1] = np.concatenate([tails[-1], np.zeros(padding, dtype=np.int64)])
    positions = [np.arange(len(head)) for head in heads]
    positions += [len(prompts[n]) - 1 + np.arange(len(tail)) for n, tail in zip(order, tails, strict=True)]
    head_lengths = np.array([len(head) for head in heads])
    tail_lengths = np.array([len(tail) for tail in tails])
    owners = np.repeat(np.arange(len(heads)), [len(numbers) for numbers in groups.values()])
    owned_lengths = np.bincount(owners, weights=tail_lengths).astype(np.int64)
    lengths = (np.concatenate([head_lengths, tail_lengths]), head_lengths, owned_lengths)
    row = {
        "input_ids": torch.from_numpy(np.concatenate([*heads, *tails]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
    }
    parts, head_bounds, owned = (torch.from_numpy(np.append(0, np.cumsum(n)).astype(np.int32)) for n in lengths)
    a, b, c = (round_up(int(n.max()), LENGTH_STEP) for n in lengths)
    return row, SharedPrompts(parts, head_bounds, owned, (a, b, c), int(head_lengths.sum())), order


def reply_log_probs(
    model: Any, engine: str, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray], *,
    temperature: float = 1.0, width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Log probability of each token of replies, and the entropy of its distribution, in one pass.

    Args:
        model: a model with packing.use_packed_attention.
        engine: "transformers" or "unsloth".
        prompts, replies: token ids, int64 (tokens,); a prompt for each reply.
        temperature: logits are divided by it.
        width: columns of the results; default: the longest reply.

    Returns:
        Two tensors, float32 (replies, width), 0 after a reply's end; the entropies have no gradient.
    """
    import torch

    logits, rows, columns, places = _logits_of_replies(model, engine, prompts, replies)
    logits = logits.float() / temperature
    targets = np.concatenate(replies).astype(np.int64)
    indices = torch.from_numpy(np.stack([targets, rows, columns, places])).to(logits.device, non_blocking=True)
    log_probs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropies = -(log_probs.exp() * log_probs).sum(-1)
    shape = (len(replies), width or max(map(len, replies)))
    cells = (indices[1], indices[2])
    chosen, entropies = log_probs[indices[3], indices[0]], entropies[indices[3]]
    return chosen.new_zeros(shape).index_put(cells, chosen), entropies.new_zeros(shape).index_put(cells, entropies)


def solution_logits(
    model: Any, engine: str, prompts: Sequence[np.ndarray], solutions: Sequence[np.ndarray]
) -> torch.Tensor:
    """Logits that predict the tokens of solutions, in one pass; see `reply_log_probs`.

    Returns:
        (tokens of all solutions, vocabulary), one solution after the other.
    """
    import torch

    logits, _, _, places = _logits_of_replies(model, engine, prompts, solutions)
    return logits[torch.from_numpy(places).to(logits.device)]


def _logits_of_replies(
    model: Any, engine: str, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    # The logits after the prompts; and for each token of each reply: the reply's number, the token's column in the
    # reply, and the place of its logits.
    computed, owner = covering_replies(prompts, replies)
    row, shared, order = share_prompts([prompts[at] for at in computed], [replies[at] for at in computed])
    begins, begin = {}, 0  # where the computed replies begin, counted from the end of the prompts
    for at in order:
        begins[computed[at]] = begin
        begin += len(replies[computed[at]])
    lengths = np.array([len(reply) for reply in replies])
    rows = np.repeat(np.arange(len(replies)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    places = np.array([begins[number] for number in owner])[rows] + columns
    device = model.get_input_embeddings().weight.device if hasattr(model, "get_input_embeddings") else model.device
    batch = {name: value.to(device, non_blocking=True) for name, value in row.items()}
    batch |= _engine_arguments(shared, engine, device)
    after_prompts = row["input_ids"].shape[1] - shared.tokens  # with the padding of the row
    return model(**batch, logits_to_keep=after_prompts, use_cache=False).logits[0, :begin], rows, columns, places


def covering_replies(prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Replies to compute: a reply is skipped when a longer reply to the same prompt starts with it.

    The last token may differ: the logits that predict a reply depend on its prompt and on its tokens but the last.

    Returns:
        The numbers of the replies to compute, ascending, and for each reply the number of the one that covers it.
    """
    computed: dict[bytes, list[tuple[int, bytes]]] = {}  # by prompt: number and tokens of the replies to compute
    owner = [0] * len(replies)
    for number in sorted(range(len(replies)), key=lambda at: -len(replies[at])):
        tokens = np.asarray(replies[number], dtype=np.int64)
        fed, group = tokens[:-1].tobytes(), computed.setdefault(prompts[number].tobytes(), [])
        owner[number] = next((at for at, others in group if others.startswith(fed)), number)
        if owner[number] == number:
            group.append((number, tokens.tobytes()))
    return sorted(set(owner)), owner


def _engine_arguments(shared: SharedPrompts, engine: str, device: torch.device) -> dict[str, Any]:
    # The arguments of a forward pass besides ids and positions, see packing.use_packed_attention.
    parts, prompts, owned = (bounds.to(device, non_blocking=True) for bounds in shared[:3])
    moved = SharedPrompts(parts, prompts, owned, shared.longest, shared.tokens)
    if engine == "unsloth":
        lengths = (shared.parts[1:] - shared.parts[:-1]).to(device, non_blocking=True)
        return {"packed_seq_lengths": lengths, "packed_documents": (moved, shared.longest[0])}
    return {"shared_prompts": moved}


# -- attention


def attend_shared(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shared: SharedPrompts, scaling: float | None = None,
    *, kernel: bool,
) -> torch.Tensor:  # fmt: skip
    """Causal attention within each segment of a row, and from each reply to its prompt; see packing.attend_documents.

    Args:
        kernel: use PyTorch's flash attention, see packing.has_document_kernel.

    Returns:
        (1, tokens, query heads, size).
    """
    if kernel:
        import torch

        if not torch.compiler.is_compiling():
            define_operators()
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attend = torch.ops.arc_finetuning.attend_shared
        return attend(q, k, v, *shared[:3], shared.longest, shared.tokens, scaling)[0][None]
    return _attend_by_segment(query, key, value, shared, scaling)


def _attend_by_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shared: SharedPrompts, scaling: float | None
) -> torch.Tensor:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    bounds, owned = shared.parts.tolist(), shared.owned.tolist()
    count = len(shared.prompts) - 1
    results = []
    options = {"scale": scaling, "enable_gqa": query.shape[1] > key.shape[1]}
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        segment, prompt = slice(begin, end), slice(begin, begin)
        if number >= count:
            owner = int(np.searchsorted(owned, begin - shared.tokens, side="right")) - 1
            prompt = slice(bounds[owner], bounds[owner + 1])
        keys, values = (torch.cat([tensor[:, :, prompt], tensor[:, :, segment]], dim=2) for tensor in (key, value))
        columns = torch.arange(keys.shape[2], device=query.device)
        mask = columns <= columns[begin - end :, None]
        results.append(scaled_dot_product_attention(query[:, :, segment], keys, values, attn_mask=mask, **options))
    return torch.cat(results, dim=2).transpose(1, 2).contiguous()


def _kernels() -> tuple[Any, Any]:
    # Private operators: torch.nn.attention.varlen has no backward pass for given sums, and takes grouped heads in 2.11
    # or in 2.12 and later, but not in both by one call.
    import torch

    return torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


@functools.cache
def define_operators() -> None:
    """Register the operators that `attend_shared` calls; for compiled layers each is one operation, whatever the row.

    The kernel runs twice: for each segment to itself, and for the replies to their prompts. Softmax over both is the
    mean of the two results, weighted by their sums of exponentials; the kernel returns the logarithms of the sums. In
    the backward pass each call gives its share of the gradients, from the whole result and the whole sum.
    """
    import torch
    from torch import library

    rest = "Tensor parts, Tensor prompts, Tensor owned, SymInt[] longest, SymInt tokens, float? scaling"
    name = "arc_finetuning::attend_shared"

    @library.custom_op(name, mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {rest}) -> (Tensor, Tensor)")
    def forward(
        q: Any, k: Any, v: Any, parts: Any, prompts: Any, owned: Any, longest: Any, tokens: int, scaling: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attend, _ = _kernels()
        out, out_sum = attend(q, k, v, parts, parts, longest[0], longest[0], 0.0, True, False, scale=scaling)[:2]
        to_prompt, prompt_sum = attend(
            q[tokens:], k[:tokens], v[:tokens], owned, prompts, longest[2], longest[1], 0.0, False, False, scale=scaling
        )[:2]
        both = torch.logaddexp(out_sum[:, tokens:], prompt_sum)  # (heads, tokens of replies)
        share = torch.exp(prompt_sum - both).t()[..., None]
        mixed = torch.lerp(out[tokens:].float(), to_prompt.float(), share).to(out.dtype)
        return torch.cat([out[:tokens], mixed]), torch.cat([out_sum[:, :tokens], both], dim=1)

    @forward.register_fake
    def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @library.custom_op(
        f"{name}_backward", mutates_args=(),
        schema=f"(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, {rest})"
        " -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    def backward(
        gradient: torch.Tensor, q: Any, k: Any, v: Any, out: Any, sums: torch.Tensor, parts: Any, prompts: Any,
        owned: Any, longest: Any, tokens: int, scaling: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        _, back = _kernels()
        gradient = gradient.contiguous()
        # The state of a random generator, for a dropout of 0.
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
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

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
