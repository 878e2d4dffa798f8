"""One cast of all adapters: the numbers of single casts, and only in forward passes of a training.

Unsloth itself needs CUDA: here is a stand-in for the two things that matter of it, how its layers find the function
that reads their adapters, and what they compute with them.
"""

import copy
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from arc.models import adapter_casts as adapter_casts_module
from arc.models.adapter_casts import MOST_MEMORY, cast_adapters_together, cast_function
from arc.models.library_patches import UNSLOTH_KERNELS as KERNELS
from arc.models.library_patches import UNSLOTH_READER as READER
from arc.models.loading import Precision, decoding
from arc.models.lora import LINEAR_MODULES, add_lora, train_in_float32
from tests import tiny_models

BF16 = torch.bfloat16


class FusedLinear(torch.autograd.Function):
    """What Unsloth's LoRA_W computes: A and B in the type of x, and their gradients in it."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        ctx.save_for_backward(a, b, x)
        ctx.weight, ctx.scaling = weight, scaling
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ weight.t()
        out.addmm_(rows @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scaling)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        a, b, x = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        a, b = a.to(x.dtype).t(), b.to(x.dtype).t()
        da, db = torch.empty_like(a), torch.empty_like(b)
        da.addmm_(rows.t(), dy @ b.t(), alpha=ctx.scaling, beta=0)
        db.addmm_(a.t() @ rows.t(), dy, alpha=ctx.scaling, beta=0)
        dx = (dy @ ctx.weight).addmm_(dy @ b.t(), a.t(), alpha=ctx.scaling)
        return dx.view(x.shape), None, da.t(), db.t(), None


def get_lora_parameters(proj):
    """As Unsloth's."""
    weight = proj.base_layer.weight
    if proj.disable_adapters or proj.merged:
        return weight, None, None, None, None
    (name,) = proj.active_adapters
    return weight, None, proj.lora_A[name].weight, proj.lora_B[name].weight, proj.scaling[name]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The stand-in for Unsloth's module, and what its layers were given: (types of A and B) of each."""
    module = types.ModuleType(KERNELS)
    module.get_lora_parameters = get_lora_parameters
    module.given = []

    def fused_forward(self, x):
        weight, _, a, b, scaling = module.get_lora_parameters(self)
        if a is None:
            return x @ weight.t()
        if not torch.compiler.is_compiling():
            module.given.append((a.dtype, b.dtype))
        return FusedLinear.apply(x, weight, a, b, scaling)

    module.fused_forward = fused_forward
    monkeypatch.setitem(sys.modules, KERNELS, module)
    yield module
    assert adapter_casts_module._running is None


def adapted(kernels, r=8):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(BF16)
    options = {"r": r, "lora_alpha": 40, "use_rslora": True, "target_modules": list(LINEAR_MODULES)}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # as after some training
    train_in_float32(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = types.MethodType(kernels.fused_forward, module)
    return model.train()


IDS = [torch.arange(60).reshape(3, 20) % 50, torch.arange(60).flip(0).reshape(3, 20) % 50]
SINGLE, SHARED = (torch.float32, torch.float32), (BF16, BF16)


def backward(model, *batches):
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def given(kernels):
    found, kernels.given = set(kernels.given), []
    return found


def same(first, second):
    assert first[0] == second[0] and set(first[1]) == set(second[1])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


# ---------------------------------------------------------------------------------------------------------------------
# The autograd function


def test_values_and_gradients_are_those_of_single_casts():
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng) for shape in ((3, 4), (5,), (2, 3))]
    weights = [weight.requires_grad_() for weight in (weights[0].t(), *weights[1:])]
    casts = cast_function().apply(BF16, *weights)
    assert [cast.dtype for cast in casts] == [BF16] * 3 and casts[0].stride() == weights[0].stride()
    for cast, weight in zip(casts, weights, strict=True):
        assert torch.equal(cast, weight.to(BF16)) and not torch.equal(cast.float(), weight)
    for factor in (1, 4096):  # in bfloat16, 4096 + 1 would be 4096
        casts = cast_function().apply(BF16, *weights)
        (casts[0].float().sum() * factor + casts[2].float().sum() / 3).backward()
    assert weights[0].grad.dtype == torch.float32 and torch.equal(weights[0].grad, torch.full((4, 3), 4097.0))
    assert weights[1].grad is None, "not used"
    third = torch.tensor(1 / 3).to(BF16).float()
    assert torch.equal(weights[2].grad, torch.full((2, 3), 2 * third))


def test_its_backward_pass_is_not_one_to_differentiate():
    weight = torch.ones(2, requires_grad=True)
    (cast,) = cast_function().apply(BF16, weight)
    (gradient,) = torch.autograd.grad(cast.float().pow(2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# A training


class Casts(TorchDispatchMode):
    """Counts single casts between float32 and bfloat16 of matrices, and calls that cast many."""

    def __init__(self):
        super().__init__()
        self.single = self.together = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.single += args[0].dim() == 2 and {args[0].dtype, out.dtype} == {torch.float32, BF16}
        self.together += function is torch.ops.aten._foreach_copy_.default
        return out


def test_a_step_is_the_same_with_two_calls_in_place_of_84(kernels):
    plain, shared = adapted(kernels), adapted(kernels)
    trained = [p for p in shared.parameters() if p.requires_grad]
    with Casts() as counted:
        expected = backward(plain, *IDS)
    assert (counted.single, counted.together) == (2 * 3 * 28, 0) and given(kernels) == {SINGLE}
    assert cast_adapters_together(shared, BF16) == len(trained) == 28
    with Casts() as counted:
        found = backward(shared, *IDS)
    assert (counted.single, counted.together) == (0, 2 * 2) and given(kernels) == {SHARED}
    same(expected, found)
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    for model in (plain, shared):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.step()
            optimizer.zero_grad()
            last = backward(model, *IDS)
        model.last = last
    same(plain.last, shared.last)
    assert plain.last[0][0] < expected[0][0], "it learns"
    for (name, first), (_, second) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def test_what_is_asked_for_again_is_read_as_ever(kernels):
    plain, shared = adapted(kernels), adapted(kernels)
    cast_adapters_together(shared, BF16)
    for model in (plain, shared):
        first, second = model.base_model.model.model.layers
        second.self_attn.q_proj = first.self_attn.q_proj
    expected = backward(plain, IDS[0])
    given(kernels)
    same(expected, backward(shared, IDS[0]))
    assert given(kernels) == {SINGLE, SHARED}


def test_a_pass_that_ran_out_of_memory_leaves_nothing(kernels):
    model = adapted(kernels)
    expected = backward(copy.deepcopy(model), IDS[0])
    cast_adapters_together(model, BF16)

    def fail(*_):
        assert adapter_casts_module._running is not None
        raise torch.OutOfMemoryError

    hook = model.base_model.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=IDS[0])
    assert adapter_casts_module._running is None
    hook.remove()
    given(kernels)
    same(expected, backward(model, IDS[0]))
    assert given(kernels) == {SHARED}


def test_a_copy_casts_its_own(kernels):
    model = adapted(kernels)
    cast_adapters_together(model, BF16)
    copied = copy.deepcopy(model)
    same(backward(model, IDS[0]), backward(copied, IDS[0]))
    assert given(kernels) == {SHARED}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Where it is not used


def test_only_passes_of_a_training(kernels, monkeypatch):
    model = adapted(kernels)
    cast_adapters_together(model, BF16)
    backward(model, IDS[0])
    assert given(kernels) == {SHARED}
    with torch.no_grad():
        model(input_ids=IDS[0])
    assert given(kernels) == {SINGLE}
    with decoding(model, "transformers"):
        model(input_ids=IDS[0])
    model.eval()
    model(input_ids=IDS[0])
    assert given(kernels) == {SINGLE}
    model.train()
    with model.disable_adapter():
        model(input_ids=IDS[0])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer(torch.ones(1, 32, dtype=BF16))  # by itself, outside of a pass
    assert given(kernels) == {SINGLE}
    monkeypatch.setattr(adapter_casts_module, "several_processes", lambda: True)
    backward(model, IDS[0])
    assert given(kernels) == {SINGLE}
    monkeypatch.undo()
    sys.modules[KERNELS] = kernels
    backward(model, IDS[0])
    assert given(kernels) == {SHARED}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)  # as a trainer may
    model.zero_grad()
    with Casts() as counted:
        backward(model, IDS[0])
    assert counted.together == 0
    train_in_float32(model)
    given(kernels)
    model.zero_grad()
    backward(model, IDS[0])
    assert given(kernels) == {SHARED}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_looked_at_in_each_pass(kernels, reentrant):
    plain, shared = adapted(kernels), adapted(kernels)
    cast_adapters_together(shared, BF16)
    for model in (plain, shared):
        model.enable_input_require_grads()
    for on, expected in ((False, {SHARED}), (True, {SINGLE}), (False, {SHARED})):
        for model in (plain, shared):
            if on:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            else:
                model.gradient_checkpointing_disable()
            model.zero_grad()
        found = backward(plain, *IDS)
        given(kernels)
        same(found, backward(shared, *IDS))
        assert given(kernels) == expected


def test_compiled_layers_read_as_ever(kernels):
    model = adapted(kernels)
    expected = backward(copy.deepcopy(model), IDS[0])
    cast_adapters_together(model, BF16)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    read = []

    def traced(x):
        weight, _, a, b, scaling = kernels.get_lora_parameters(layer)
        read.append(a.dtype)
        return x @ weight.t() + (x @ a.to(x.dtype).t() @ b.to(x.dtype).t()) * scaling

    layer.forward = torch.compile(traced, backend="eager", fullgraph=True)
    given(kernels)
    losses, found = backward(model, IDS[0])
    assert read[-1] == torch.float32 and given(kernels) == {SHARED}  # the other layers
    assert set(found) == set(expected[1])
    torch.testing.assert_close(losses, expected[0], rtol=0.01, atol=0)


def test_no_unsloth_no_adapters_or_no_room_and_all_stays(kernels, monkeypatch):
    model = adapted(kernels)
    hooks = len(model._forward_pre_hooks)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for size, fits in ((2 * count / MOST_MEMORY - 1, 0), (2 * count / MOST_MEMORY + 1, 28)):
        monkeypatch.setattr(adapter_casts_module, "_memory", lambda device, size=size: size)
        assert cast_adapters_together(adapted(kernels), BF16) == fits
    kernels.get_lora_parameters = get_lora_parameters
    for missing in (types.ModuleType(KERNELS), None):
        monkeypatch.setitem(sys.modules, KERNELS, missing)
        assert cast_adapters_together(model, BF16) == 0
    monkeypatch.setitem(sys.modules, KERNELS, kernels)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert cast_adapters_together(model, BF16) == 0
    assert len(model._forward_pre_hooks) == hooks and getattr(kernels, READER) is get_lora_parameters


@pytest.mark.parametrize("options", [{}, {"cast_together": False}])
def test_lora_on_the_unsloth_engine_has_it(kernels, monkeypatch, options):
    made = types.SimpleNamespace(get_peft_model=lambda model, **_: model)
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastLanguageModel=made))
    model = add_lora(adapted(kernels), Precision("unsloth", "bfloat16", True), **options)
    backward(model, IDS[0])
    assert given(kernels) == ({SINGLE} if options else {SHARED})


def test_unsloths_function_is_replaced_once(kernels):
    cast_adapters_together(adapted(kernels), BF16)
    replaced = getattr(kernels, READER)
    assert replaced is not get_lora_parameters
    cast_adapters_together(adapted(kernels), BF16)
    assert getattr(kernels, READER) is replaced


# ---------------------------------------------------------------------------------------------------------------------
# With Unsloth

UNSLOTH = """
import os, sys
os.environ |= {"UNSLOTH_RETURN_LOGITS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
import unsloth, numpy as np, torch
from accelerate.utils import send_to_device
sys.path.insert(0, sys.argv[1])
from arc.models import adapter_casts as adapter_casts_module
from arc.models.loading import Precision, load_model
from arc.models.lora import add_lora, set_gradient_checkpointing
from arc.models.packing import pack_rows, use_packed_attention
torch.use_deterministic_algorithms(True, warn_only=True)
precision = Precision("unsloth", "bfloat16", True)
model, tokenizer = load_model(sys.argv[2], precision, 512)
model = add_lora(model, precision, r=32, gradient_checkpointing=False, cast_together=False)
use_packed_attention(model, "unsloth")
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
rng = np.random.default_rng(0)
rows = [(rng.integers(0, len(tokenizer), n), np.ones(n, dtype=bool)) for n in (130, 40, 77, 300)]
batches = [pack_rows(part, "unsloth", multiple_of=8) for part in (rows[:2], rows[2:])]
asked = []
def gradients(checkpointing=False):
    set_gradient_checkpointing(model, "unsloth", checkpointing)
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**send_to_device(dict(batch), "cuda")).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
def far(first, second):
    assert len(first) == len(second) and all(a.dtype == b.dtype for a, b in zip(first, second))
    return max(float((a - b).abs().max()) for a, b in zip(first, second))
gradients()
plain, again = gradients(), gradients()
count = adapter_casts_module.cast_adapters_together(model, torch.bfloat16)
take = adapter_casts_module.AdapterCasts.take
adapter_casts_module.AdapterCasts.take = lambda self, weight: asked.append(take(self, weight)) or asked[-1]
shared = gradients()
taken = {cast.dtype for cast in asked}
asked.clear()
recomputed = gradients(checkpointing=True)
print(count, "matrices; differences without", far(plain, again), "with", far(plain, shared))
assert taken == {torch.bfloat16} and not asked, "asked for in each pass but those that are computed again"
assert far(plain, shared) <= 2 * far(plain, again)
print("the same")
"""


@pytest.mark.gpu
def test_the_same_gradients_with_unsloth(tmp_path):
    assert "the same\n" in tiny_models.run_with_unsloth(UNSLOTH, tiny_models.prepared_base(tmp_path))
