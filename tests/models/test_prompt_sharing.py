"""Prompts that completions share: one row gives what rows of their own give."""

import numpy as np
import pytest
import torch
from torch import library
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from arc.models import packing
from arc.models import prompt_sharing as prompt_sharing_module
from arc.models.packing import use_packed_attention
from arc.models.prompt_sharing import attend_shared, covering_replies, reply_log_probs, share_prompts, solution_logits
from arc.training.batch_planning import compile_layers
from tests import tiny_models


def make_model(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_groups(seed=0):
    """Prompts of three groups in mixed order, and replies of different length."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 50, length) for length in (9, 2, 14)]
    order = [0, 1, 0, 2, 2, 1, 0]
    return [prompts[at] for at in order], [rng.integers(0, 50, length) for length in (4, 1, 6, 3, 3, 5, 1)]


def one_by_one(model, prompts, replies, temperature=1.0):
    """Log probabilities and entropies of replies, each from a pass of its own."""
    width = max(map(len, replies))
    found, entropies = [], []
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, reply]))[None].to(model.device)
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
        log_probs = logits.log_softmax(-1)
        missing = width - len(reply)
        chosen = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        found.append(torch.nn.functional.pad(chosen, (0, missing)))
        entropies.append(torch.nn.functional.pad(-(log_probs.exp() * log_probs).sum(-1), (0, missing)))
    return torch.stack(found), torch.stack(entropies)


def test_a_row_by_hand():
    a, b = np.array([5, 6, 7]), np.array([8, 9])
    row, shared, order = share_prompts([a, b, a], [np.array([1, 2]), np.array([3]), np.array([4])])
    assert order == [0, 2, 1]
    assert row["input_ids"].tolist() == [[5, 6, 8, 7, 1, 7, 9, 0]]  # filled up to eight
    assert row["position_ids"].tolist() == [[0, 1, 0, 2, 3, 2, 1, 2]]
    assert shared.parts.tolist() == [0, 2, 3, 5, 6, 8]
    assert shared.prompts.tolist() == [0, 2, 3]
    assert shared.owned.tolist() == [0, 3, 5]
    assert shared.tokens == 3 and shared.longest == (256, 256, 256)
    with pytest.raises(ValueError, match="two tokens"):
        share_prompts([np.array([1])], [np.array([1])])
    with pytest.raises(ValueError, match="one or more"):
        share_prompts([a], [np.array([], dtype=np.int64)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_as_rows_of_their_own(temperature):
    model = make_model()
    prompts, replies = make_groups()
    expected, expected_entropies = one_by_one(model, prompts, replies, temperature)
    weights = torch.randn_like(expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    use_packed_attention(model)
    found, entropies = reply_log_probs(model, "transformers", prompts, replies, temperature=temperature)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(entropies, expected_entropies, atol=1e-5) and not entropies.requires_grad
    for name, own, other in zip(names, torch.autograd.grad((found * weights).sum(), parameters), wanted, strict=True):
        assert torch.allclose(own, other, atol=1e-5), name
    assert reply_log_probs(model, "transformers", prompts, replies, width=9)[0].shape == (7, 9)


def test_replies_that_others_cover_are_not_computed():
    a, b = np.array([5, 6, 7]), np.array([8, 9])
    prompts = [a, a, b, a, a, b]
    replies = [np.array(ids) for ids in ([1, 2, 3], [1, 9], [1, 2, 3], [1, 2, 3], [4, 4], [1, 2, 7])]
    # [1, 9] has the context of [1, 2, 3] at both of its tokens; to b, [1, 2, 7] that of [1, 2, 3] at all three.
    assert covering_replies(prompts, replies) == ([0, 2, 4], [0, 0, 2, 0, 4, 2])
    model = make_model()
    expected, entropies = one_by_one(model, prompts, replies)
    weights = torch.arange(1.0, 7)[:, None]
    wanted = torch.autograd.grad((expected * weights).sum(), model.lm_head.weight)[0]
    use_packed_attention(model)
    seen = []
    hook = model.model.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
    found, own = reply_log_probs(model, "transformers", prompts, replies)
    hook.remove()
    assert seen == [16]  # two prompts without their last tokens, and 3 + 2 + 3 tokens of replies, filled up to eights
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(own, entropies, atol=1e-5)
    assert torch.allclose(torch.autograd.grad((found * weights).sum(), model.lm_head.weight)[0], wanted, atol=1e-5)


def test_logits_along_solutions():
    model = make_model()
    prompts, solutions = [np.array([8, 9]), np.array([5, 6, 7])], [np.array([1, 2, 3]), np.array([4])]
    with torch.no_grad():
        expected = [
            model(torch.from_numpy(np.concatenate([p, s]))[None], use_cache=False).logits[0, len(p) - 1 : -1]
            for p, s in zip(prompts, solutions, strict=True)
        ]
        use_packed_attention(model)
        assert torch.allclose(
            solution_logits(model, "transformers", prompts, solutions), torch.cat(expected), atol=1e-5
        )


def test_recomputed_activations_give_the_same_gradients():
    prompts, replies = make_groups(1)
    gradients = []
    for on in (False, True):
        model = make_model().train()
        use_packed_attention(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        reply_log_probs(model, "transformers", prompts, replies)[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


def documents(of_queries, of_keys):
    bounds = (each.tolist() for each in (of_queries[:-1], of_queries[1:], of_keys[:-1], of_keys[1:]))
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(*bounds, strict=True)]


def scores_of(query, key, causal, scale):
    scores = torch.einsum("qhd,khd->hqk", query.double(), repeated(query, key)) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf) if causal else scores


def repeated(query, other):
    return other.double().repeat_interleave(query.shape[1] // other.shape[1], 1)


def forward_kernel(q, k, v, of_queries, of_keys, longest_query, longest_key, dropout, causal, debug, *, scale=None):
    """What aten::_flash_attention_forward gives, for rows of documents, on any device."""
    assert of_queries.diff().max() <= longest_query and of_keys.diff().max() <= longest_key and not dropout
    out, sums = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    for queries, keys in documents(of_queries, of_keys):
        scores = scores_of(q[queries], k[keys], causal, scale)
        sums[:, queries] = scores.logsumexp(-1).float()
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated(q, v[keys])).to(q.dtype)
    return out, sums, None, None, None


def backward_kernel(
    gradient, q, k, v, out, sums, of_queries, of_keys, longest_query, longest_key, dropout, causal, state, offset, *,
    scale=None,
):  # fmt: skip
    """What aten::_flash_attention_backward gives: from the result and the sums that it is told."""
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for queries, keys in documents(of_queries, of_keys):
        shares = (scores_of(q[queries], k[keys], causal, scale) - sums[:, queries, None].double()).exp()
        own, whole = gradient[queries].double(), (gradient[queries].double() * out[queries].double()).sum(-1)
        of_scores = shares * (torch.einsum("qhd,khd->hqk", own, repeated(q, v[keys])) - whole.t()[..., None])
        of_scores *= scale or q.shape[-1] ** -0.5
        dq[queries] = torch.einsum("hqk,khd->qhd", of_scores, repeated(q, k[keys])).to(q.dtype)
        for found, parts, others in ((dk, of_scores, q[queries].double()), (dv, shares, own)):
            of_heads = torch.einsum("hqk,qhd->khd", parts, others)
            found[keys] = of_heads.unflatten(1, (-1, group)).sum(2).to(found.dtype)
    return dq, dk, dv


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(prompt_sharing_module, "_kernels", lambda: (forward_kernel, backward_kernel))
    monkeypatch.setattr(packing, "has_document_kernel", lambda query: True)


@pytest.mark.parametrize("scaling", [None, 0.5])
def test_two_calls_of_a_kernel_give_what_its_parts_give(kernels, scaling):
    row, shared, _ = share_prompts(*make_groups())
    torch.manual_seed(0)
    parts = [torch.randn(1, heads, row["input_ids"].shape[1], 8, requires_grad=True) for heads in (4, 2, 2)]
    weights, results = torch.randn(1, row["input_ids"].shape[1], 4, 8), []
    for kernel in (False, True):
        found = attend_shared(*parts, shared, scaling, kernel=kernel)
        results.append([found, *torch.autograd.grad((found * weights).sum(), parts)])
    for plain, other in zip(*results, strict=True):
        assert torch.allclose(plain, other, atol=1e-5) and plain.abs().sum() > 1
    q, k, v = (part[0].transpose(0, 1).detach().requires_grad_() for part in parts)
    given = (q, k, v, *shared[:3], list(shared.longest), shared.tokens, scaling)
    library.opcheck(torch.ops.arc_finetuning.attend_shared, given)


def rows_of_every_kind():
    """Prompts and replies: of many lengths, several and one of each, alike and different in a group."""
    for seed, owners in enumerate(((0, 0, 1, 2, 2), (0, 0, 0, 0), (0, 1, 2, 3, 3, 4), (0, 1))):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 50, length) for length in rng.integers(2, 600, max(owners) + 1)]
        same = rng.integers(0, 50, 7)
        replies = [same if number == 1 else rng.integers(0, 50, 3 + number) for number in range(len(owners))]
        yield [prompts[owner] for owner in owners], replies


def results_of(model, compile_them=None):
    """Log probabilities and gradients of rows of every kind, in turn; with the model's layers compiled first."""
    if compile_them:
        torch.compiler.reset()
        counters.clear()
        compile_them(model)
    results = []
    for prompts, replies in rows_of_every_kind():
        model.zero_grad()
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            found = reply_log_probs(model, "transformers", prompts, replies)[0]
        found.mean().backward()
        results.append([found.detach(), *(weight.grad.clone() for weight in model.parameters())])
    return results


@pytest.mark.training
def test_compiled_layers_are_one_graph_whatever_the_row(kernels):
    def compile_them(model):
        for layer in model.model.layers:
            layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")

    model = make_model().train()
    use_packed_attention(model)
    for plain, compiled in zip(results_of(model), results_of(model, compile_them), strict=True):
        for one, other in zip(plain, compiled, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    with torch.no_grad():  # as stage 3 samples
        for prompts, replies in rows_of_every_kind():
            solution_logits(model, "transformers", prompts, replies)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_compiled_for_a_gpu_give_what_they_give(dtype):
    model = make_model(head_dim=64).to("cuda", dtype).train()
    use_packed_attention(model)
    for plain, compiled in zip(results_of(model), results_of(model, compile_layers), strict=True):
        for one, other in zip(plain, compiled, strict=True):
            assert (one.float() - other.float()).norm() <= 0.05 * one.float().norm()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_gives_what_its_parts_give():
    """In bfloat16 as close to float64 as the plain way is, with the gradients of all three."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, length) for length in (900, 513, 2, 1200)]
    prompts = [prompts[at] for at in (0, 1, 1, 2, 3, 3, 3, 0)]
    replies = [rng.integers(0, 50, length) for length in (112, 1, 50, 30, 112, 111, 2, 300)]
    row, shared, _ = share_prompts(prompts, replies)
    tokens = row["input_ids"].shape[1]
    shared = shared._replace(parts=shared.parts.cuda(), prompts=shared.prompts.cuda(), owned=shared.owned.cuda())
    torch.manual_seed(0)
    parts = [torch.randn(1, heads, tokens, 64, device="cuda", dtype=torch.float64) for heads in (8, 2, 2)]
    weights = torch.randn(1, tokens, 8, 64, device="cuda", dtype=torch.float64)
    results = {}
    for name, dtype, kernel in (("exact", torch.float64, False), ("plain", torch.bfloat16, False),
                                ("kernel", torch.bfloat16, True)):  # fmt: skip
        own = [part.bfloat16().to(dtype).requires_grad_() for part in parts]
        found = attend_shared(*own, shared, kernel=kernel)
        results[name] = [found, *torch.autograd.grad((found * weights.to(dtype)).sum(), own)]
    for exact, plain, kernel in zip(*results.values(), strict=True):
        error = [((part.double() - exact).norm() / exact.norm()).item() for part in (plain, kernel)]
        assert error[1] <= 1.3 * error[0] + 1e-4 and error[1] < 0.01, error


UNSLOTH = """
import sys
import unsloth, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from arc.models.loading import Precision, load_model
from arc.models.lora import add_lora
from arc.models.packing import use_packed_attention
from arc.models.prompt_sharing import reply_log_probs
precision = Precision("unsloth", "bfloat16", True)
model, tokenizer = load_model(sys.argv[2], precision, 1024)
model = add_lora(model, precision, r=8, gradient_checkpointing=sys.argv[3] == "True")
torch.manual_seed(0)
for name, weight in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.1)
use_packed_attention(model, "unsloth")
model.train()
rng = np.random.default_rng(0)
prompts = [rng.integers(0, len(tokenizer), n) for n in (400, 2, 130)]
prompts = [prompts[at] for at in (0, 1, 0, 2, 2, 1, 0)]
replies = [rng.integers(0, len(tokenizer), n) for n in (40, 1, 60, 30, 30, 50, 1)]
trained = [weight for weight in model.parameters() if weight.requires_grad]
weights = torch.randn(7, 60, device="cuda")

def log_probs(parts):
    with torch.autocast("cuda", torch.bfloat16):
        found = [reply_log_probs(model, "unsloth", prompts[part], replies[part], width=60) for part in parts]
    values, entropies = (torch.cat(each) for each in zip(*found))
    model.zero_grad()
    (values * weights).sum().backward()
    return values.detach(), entropies, torch.cat([weight.grad.flatten().float() for weight in trained])

together = log_probs([slice(0, 7)])
alone = log_probs([slice(at, at + 1) for at in range(7)])
scale = (alone[0] - alone[0].roll(1, 0)).abs().mean()  # of a wrong order
for one, other, most in zip(together, alone, (0.05 * scale, 0.05, None)):
    error = (one - other).norm() / other.norm() if most is None else (one - other).abs().mean()
    print("difference", float(error), float(scale))
    assert error < (0.05 if most is None else most)
print("the same")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_unsloth_shares_them_too(tmp_path, gradient_checkpointing):
    base = tiny_models.prepared_base(tmp_path)
    assert "the same\n" in tiny_models.run_with_unsloth(UNSLOTH, base, gradient_checkpointing)
