"""Muon for many matrices at once: torch's steps, AdamW's for the rest, and trainings that stop and continue."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from arc.models.lora import LINEAR_MODULES
from arc.runs.needs import WeightCounts, optimizer_bytes
from arc.training import optimizers
from arc.training.muon import Muon, orthogonalise
from arc.training.optimizers import BESIDE_MUON, MUON, optimizer_with_embedding_rate
from tests.helpers import call
from tests.scripts.test_stages import SFT, artifact

SHAPES = [(16, 16), (16, 24), (16, 16), (40, 16), (16, 16), (16, 24)]


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) / 4) for shape in shapes]


def give_gradients(step, *lists):
    """The same gradients to each list; each step others, but for the first, in which the second matrix has zeros."""
    generator = torch.Generator().manual_seed(step)
    for place, alike in enumerate(zip(*lists, strict=True)):
        gradient = torch.randn(alike[0].shape, generator=generator) * 10.0**-place
        for parameter in alike:
            parameter.grad = torch.zeros_like(parameter) if (step, place) == (1, 1) else gradient.clone()


@pytest.mark.parametrize("rounded", [True, False], ids=["as it is", "torch's in float32"])
def test_its_steps_are_those_of_torchs_muon(monkeypatch, rounded):
    if not rounded:  # torch's rounds to bfloat16, on CPUs too
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon(ours, **options)
    reference = torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 5):
        before = [parameter.detach().clone() for parameter in ours]
        with torch.no_grad():  # so that each step is compared by itself
            for one, other in zip(ours, theirs, strict=True):
                other.copy_(one)
        give_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
        for one, other, was in zip(ours, theirs, before, strict=True):
            moved = (one - was).norm()
            assert moved > 0 and (one - other).norm() < (0.05 if rounded else 1e-4) * moved


@pytest.mark.gpu
def test_on_a_gpu_its_steps_are_those_of_torchs_muon():
    ours, theirs = ([torch.nn.Parameter(p.detach().cuda()) for p in parameters()] for _ in range(2))
    before = [parameter.detach().clone() for parameter in ours]
    give_gradients(2, theirs)
    for one, other in zip(ours, theirs, strict=True):
        one.grad = other.grad.clone()
    Muon(ours, lr=0.02, weight_decay=0.1).step()
    torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    for one, other, was in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.05 * (one - was).norm()


def test_singular_values_come_near_one_and_zeros_stay():
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    matrices[1] *= 1e-3
    matrices[2] = 0
    made = orthogonalise(matrices)
    assert torch.equal(made[2], matrices[2])
    assert 0.6 < torch.linalg.svdvals(made[:2]).min() and torch.linalg.svdvals(made[:2]).max() < 1.3
    torch.testing.assert_close(orthogonalise(matrices.mT), made.mT, rtol=0, atol=1e-5)


def test_a_step_is_as_large_as_adamws_would_be():
    matrix = torch.nn.Parameter(torch.zeros(64, 96))
    matrix.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    Muon([matrix], lr=1.0).step()
    assert 0.15 < matrix.detach().square().mean().sqrt() < 0.25  # AdamW's is 0.2 to 0.4, by its paper


def test_vectors_and_other_groups_are_stepped_by_adamw():
    shapes = [(8, 4), (8, 4), (6,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    groups = [{"params": ours[:1]}, {"params": ours[1:2], "lr": 0.5, "use_muon": False}, {"params": ours[2:]}]
    options = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizer = Muon(groups, **options)
    reference = torch.optim.AdamW([{"params": theirs[1:2], "lr": 0.5}, {"params": theirs[2:]}], **options)
    for step in range(1, 4):
        give_gradients(step + 1, ours, theirs)
        optimizer.step()
        reference.step()
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    assert set(optimizer.state[ours[0]]) == {"momentum_buffer"}
    ours[1].grad = None  # what has no gradient stays
    optimizer.step()
    assert torch.equal(ours[1], theirs[1])


def test_a_saved_state_continues_bit_for_bit(tmp_path):
    def made(weights):
        return Muon([{"params": weights[:4]}, {"params": weights[4:], "use_muon": False}], lr=0.02, fused=True)

    whole, half = parameters(), parameters()
    optimizer, first = made(whole), made(half)
    for step in range(1, 7):
        give_gradients(step, whole)
        optimizer.step()
    for step in range(1, 4):
        give_gradients(step, half)
        first.step()
    torch.save([half, first.state_dict()], tmp_path / "half.pt")
    again, state = torch.load(tmp_path / "half.pt", weights_only=False)
    second = made(again)
    second.load_state_dict(state)
    for step in range(4, 7):
        give_gradients(step, again)
        second.step()
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    assert not torch.equal(half[0], again[0])


def adapted():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules=list(LINEAR_MODULES), modules_to_save=["embed_tokens", "lm_head"]
    )
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def test_embeddings_are_stepped_by_adamw_at_their_own_rate_and_the_state_is_as_large_as_counted():
    model = adapted()
    arguments = TrainingArguments(
        optim=BESIDE_MUON, learning_rate=1e-3, adam_beta2=0.9, weight_decay=0.1, use_cpu=True, report_to=[]
    )
    arguments.embedding_learning_rate = 1e-4
    optimizer = optimizer_with_embedding_rate(model, arguments, MUON)
    assert isinstance(optimizer, Muon)
    lora, embeddings = optimizer.param_groups
    assert (lora["lr"], lora["use_muon"], len(lora["params"])) == (1e-3, True, 2 * 7 * 2)
    assert (embeddings["lr"], embeddings["use_muon"], embeddings["betas"]) == (1e-4, False, (0.9, 0.9))
    assert [tuple(p.shape) for p in embeddings["params"]] == [(50, 32), (50, 32)]
    assert lora["weight_decay"] == embeddings["weight_decay"] == 0.1
    ids = torch.arange(40).reshape(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    counts = WeightCounts(
        linear=0, embeddings=0, other=0, lora=sum(p.numel() for p in lora["params"]), full_embeddings=50 * 32,
        full_head=50 * 32, saved=0, rank=8,
    )  # fmt: skip
    assert sum(value.numel() * value.itemsize for value in states) == optimizer_bytes(counts, MUON)


@pytest.mark.parametrize("few", [True, False])
def test_it_is_timed_on_all_of_a_few_weights_and_on_an_eighth_of_many(monkeypatch, few):
    class Noting(Muon):
        def step(self):
            stepped.append(sum(p.numel() for group in self.param_groups for p in group["params"]))

    model, stepped = adapted(), []
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(optimizers, "FEW_WEIGHTS", trained if few else trained - 1)
    assert optimizers.optimizer_seconds(model, Noting, {"lr": 1.0}, 1.0) > 0
    assert (stepped[0] == trained) == few
    assert 0 < optimizers.optimizer_seconds(model, Muon, {"lr": 1.0}, 1.0) < 10


def test_a_stage_trains_with_it_and_continues(tmp_path, demo_base, demo_dataset):
    flags = (
        *SFT, "--eval_steps", 0, "--logging_steps", 1, "--base_model", demo_base, "--dataset_dir", demo_dataset,
        "--optim", MUON, "--learning_rate", 3e-3, "--embedding_learning_rate", 1e-3, "--save_steps", 6,
        "--lr_scheduler_type", "constant", "--warmup_ratio", 0,
    )  # fmt: skip
    made = []
    for _ in range(2):
        code, printed = call("base_finetune", *flags, "--max_steps", 12, "--output_dir", tmp_path / "output")
        assert code == 0, printed[-3000:]
        made.append(load_file(artifact(tmp_path / "output", "Base-lora") / "adapter_model.safetensors"))
        if len(made) == 1:  # as if it had been stopped after its sixth step
            for part in ("Base-lora", "Base-merged", "Base-checkpoints/checkpoint-12"):
                artifact(tmp_path / "output", part).rename(tmp_path / part.rpartition("/")[2])
    assert re.search(r"continuing from \S+checkpoint-6", printed), printed[-3000:]
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert json.loads((tmp_path / "Base-lora" / "manifest.json").read_text())["settings"]["optim"] == MUON
    losses = [
        json.loads(line).get("loss") for line in (tmp_path / "Base-lora" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
