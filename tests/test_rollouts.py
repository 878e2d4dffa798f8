"""The copy that completions are sampled from: it is the model in training, at every step."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch

import model_tools
from model_tools import Precision
from rollout_tools import RolloutModel, make_rollouts
from search_tools import score_replies

IDS = torch.arange(40).reshape(2, 20) % 70


def trained(folder, tied=True, four=False, **more):
    precision = Precision("transformers", "float32", four)
    model, tokenizer = model_tools.load_model(tiny_models.prepared_base(folder, tied), precision)
    model = model_tools.add_lora(model, precision, r=8, gradient_checkpointing=False, **more)
    tiny_models.train_a_little(model, precision, IDS, steps=3)
    return model, tokenizer, precision


@pytest.mark.parametrize("four", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", "linear"])
def test_the_copy_answers_as_the_model_in_training(tmp_path, tied, four, embeddings):
    targets = [*model_tools.LINEAR_MODULES, *(model_tools.EMBEDDING_MODULES if embeddings else ())]
    model, _, precision = trained(tmp_path, tied, four, target_modules=targets)
    copy = RolloutModel(model, torch.float32)
    before = tiny_models.logits_of(copy.model, IDS)
    assert torch.allclose(before, tiny_models.logits_of(model, IDS), atol=1e-4)
    tiny_models.train_a_little(model, precision, IDS, steps=2, rate=5e-2)
    assert torch.equal(before, tiny_models.logits_of(copy.model, IDS))
    copy.update()
    after = tiny_models.logits_of(copy.model, IDS)
    assert (after - before).abs().max() > 0.01
    assert torch.allclose(after, tiny_models.logits_of(model, IDS), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in copy.model.parameters())


def test_a_copy_in_16_bits_differs_by_rounding_alone(tmp_path):
    model, _, _ = trained(tmp_path)
    copy = RolloutModel(model, torch.bfloat16)
    assert {parameter.dtype for parameter in copy.model.parameters()} == {torch.bfloat16}
    assert tiny_models.divergence(tiny_models.logits_of(model, IDS), tiny_models.logits_of(copy.model, IDS)) < 1e-3


def test_completions_come_from_the_weights_of_their_step(tmp_path):
    model, tokenizer, precision = trained(tmp_path)
    options = {"dtype": torch.float32, "max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    roll = make_rollouts(model, tokenizer, **options)
    prompts = ["I12\n+/-=O"] * 4 + ["I3\n+/-=O"] * 4

    def completions(function, step):
        return function(prompts, SimpleNamespace(state=SimpleNamespace(global_step=step)))

    first = completions(roll, 0)
    assert first["prompt_ids"] == tokenizer(prompts)["input_ids"]
    assert len({tuple(ids) for ids in first["completion_ids"]}) > 4  # each has random numbers of its own
    assert completions(roll, 0)["completion_ids"] != first["completion_ids"]  # a second call of a step too
    # What depends on the step and the weights alone is what a continued run needs.
    second = completions(roll, 1)["completion_ids"]
    assert completions(make_rollouts(model, tokenizer, **options), 1)["completion_ids"] == second
    # Changed weights change the samples, from the next step on.
    unchanged = completions(make_rollouts(model, tokenizer, **options), 2)["completion_ids"]
    tiny_models.train_a_little(model, precision, IDS, steps=5, rate=5e-2)
    assert completions(roll, 1)["completion_ids"] != second  # another call
    changed = completions(roll, 2)["completion_ids"]
    assert changed != unchanged
    assert changed == completions(make_rollouts(model, tokenizer, **options), 2)["completion_ids"]
    assert changed != completions(roll, 2)["completion_ids"]  # a second call of that step


def test_log_probabilities_are_those_of_a_plain_forward_pass(tmp_path):
    model, tokenizer, _ = trained(tmp_path)
    copy = RolloutModel(model, torch.float32)
    prompt = np.array(tokenizer("I12\n+/-=O")["input_ids"])
    from search_tools import sample_replies

    [replies] = sample_replies(
        copy.model, "transformers", tokenizer, [prompt], max_new_tokens=10, samples=6, temperature=0.7
    )
    for reply in replies:
        ids = torch.from_numpy(np.concatenate([prompt, reply.tokens]))[None]
        log_probs = torch.log_softmax(tiny_models.logits_of(model, ids)[0, len(prompt) - 1 : -1].double(), -1)
        plain = float(log_probs.gather(-1, torch.from_numpy(reply.tokens)[:, None]).sum())
        assert reply.log_prob == pytest.approx(plain, abs=1e-4)
        assert score_replies(copy.model, "transformers", tokenizer, [prompt], [reply.tokens]) == pytest.approx(
            [plain], abs=1e-4
        )
