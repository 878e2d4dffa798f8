"""The copy that completions are sampled from: it is the model in training, at every step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arc.decoding.device_sampling import DeviceSampler
from arc.decoding.scoring import score_replies
from arc.grpo.rollouts import RolloutModel, make_rollouts, make_stopped_rollouts, sample_until_wrong
from arc.models import loading, lora
from arc.models.loading import Precision
from arc.models.packing import use_packed_attention
from tests import tiny_models

IDS = torch.arange(40).reshape(2, 20) % 70


def trained(folder, tied=True, four=False, **more):
    precision = Precision("transformers", "float32", four)
    model, tokenizer = loading.load_model(tiny_models.prepared_base(folder, tied), precision)
    model = lora.add_lora(model, precision, r=8, gradient_checkpointing=False, **more)
    tiny_models.train_a_little(model, precision, IDS, steps=3)
    return model, tokenizer, precision


@pytest.mark.parametrize("four", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", "linear"])
def test_the_copy_answers_as_the_model_in_training(tmp_path, tied, four, embeddings):
    targets = [*lora.LINEAR_MODULES, *(lora.EMBEDDING_MODULES if embeddings else ())]
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
    from arc.decoding.sampling import sample_replies

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


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_along_a_solution_are_those_sampled_token_by_token(tmp_path, temperature):
    model, tokenizer, _ = trained(tmp_path)
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in ("I12\n+/-=O", "I3\n45\n+/-=O", "I777\n+/-=O")]
    end = tokenizer.eos_token_id
    copy = RolloutModel(model, torch.float32)
    sampler = DeviceSampler(copy.model, end, max_new_tokens=12, temperature=temperature)
    many = range(40)
    replies = [
        [sampler.sample([prompt], seed=3, seeds=[40 * n + k])[0][0].tokens for k in many]
        for n, prompt in enumerate(prompts)
    ]
    # Solutions that are met: what some of the model's own replies are.
    solutions = [max(own, key=lambda reply: (reply[-1] == end, -len(reply))) for own in replies]
    use_packed_attention(copy.model)
    for batch_size in (1, 2, 64):
        found = sample_until_wrong(
            copy.model, "transformers", prompts, solutions, seed=3, temperature=temperature, batch_size=batch_size,
            numbers=[[40 * n + k for k in many] for n in range(len(prompts))],
        )  # fmt: skip
        for own, solution, stopped in zip(replies, solutions, found, strict=True):
            for whole, part in zip(own, stopped, strict=True):
                assert part.tolist() == whole[: len(part)].tolist()
                assert np.array_equal(part, solution) == np.array_equal(whole, solution)
                # It goes on exactly as long as it is right.
                assert part[:-1].tolist() == solution[: len(part) - 1].tolist()
                assert len(part) == len(solution) or part[-1] != solution[len(part) - 1]
    lengths = [len(part) for own in found for part in own]
    assert min(lengths) < max(lengths), "some are stopped, some are not"
    assert any(np.array_equal(part, solution) for part, solution in zip(found[0], [solutions[0]] * 40, strict=True))


def test_stopped_completions_go_to_their_prompts(tmp_path):
    model, tokenizer, _ = trained(tmp_path)
    use_packed_attention(model)
    texts = ["I12\n+/-=O", "I3\n+/-=O"]
    solution = np.array([5, 6, tokenizer.eos_token_id])
    rows = {text: {"prompt_ids": np.array(tokenizer(text)["input_ids"]), "solution_ids": solution} for text in texts}
    roll = make_stopped_rollouts(model, "transformers", temperature=1.0, seed=5, batch_size=8)

    def completions(prompts, step):
        trainer = SimpleNamespace(state=SimpleNamespace(global_step=step), rows=[rows[text] for text in prompts])
        found = roll(prompts, trainer)
        assert found["logprobs"] is None
        assert [ids.tolist() for ids in found["prompt_ids"]] == tokenizer(prompts)["input_ids"]
        return [ids.tolist() for ids in found["completion_ids"]]

    # A prompt may come twice in a step: each of its completions is one of its own samples.
    for prompts in ([texts[0]] * 4 + [texts[1]] * 4, [texts[0]] * 8 + [texts[1]] * 4):
        first = completions(prompts, 0)
        assert all(first) and len(first) == len(prompts)
        assert len({tuple(ids) for ids in first}) > 1
        assert completions(prompts, 1) != first
        again = make_stopped_rollouts(model, "transformers", temperature=1.0, seed=5, batch_size=1)
        trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), rows=[rows[text] for text in prompts])
        assert [ids.tolist() for ids in again(prompts, trainer)["completion_ids"]] == first
    # One text with two solutions, which a puzzle may have in two views: each completion follows its own row's.
    other = {**rows[texts[0]], "solution_ids": np.array([7, 8, 9, tokenizer.eos_token_id])}
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), rows=[rows[texts[0]]] * 40 + [other] * 40)
    found = roll([texts[0]] * 80, trainer)["completion_ids"]
    for row, ids in zip(trainer.rows, found, strict=True):
        assert ids[:-1].tolist() == row["solution_ids"][: len(ids) - 1].tolist()
    assert {int(ids[0]) for ids in found[:40]} >= {5} and {int(ids[0]) for ids in found[40:]} >= {7}
