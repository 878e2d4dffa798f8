"""Samples that are chosen on the device, against those that are chosen token after token on the host."""

import numpy as np
import pytest
import torch

from arc.decoding import device_sampling
from arc.decoding.device_sampling import DeviceSampler, by_prompt, rows_to_keep
from arc.decoding.rows import UndecodableModelError
from arc.decoding.sampling import sample_replies
from tests.decoding.test_decoding import END, TOKENIZER, counting_model, tiny_model, tiny_prompts

GROUPS = [prompt for prompt in tiny_prompts() for _ in range(3)]


def on_host(model, prompts, length, temperature, seed=0, seeds=None):
    """The samples of `sampling.sample_replies`, and how probable they are."""
    found = sample_replies(
        model, "transformers", TOKENIZER, prompts, max_new_tokens=length, temperature=temperature, seed=seed,
        seeds=seeds,
    )  # fmt: skip
    return [reply.tokens.tolist() for [reply] in found], [reply.log_prob for [reply] in found]


def tokens_of(found):
    return [[reply.tokens.tolist() for reply in of_prompt] for of_prompt in found]


def check(found, expected, rel=1e-5):
    assert [reply.tokens.tolist() for [reply] in found] == expected[0]
    assert [reply.log_prob for [reply] in found] == pytest.approx(expected[1], rel=rel, abs=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_samples_are_those_of_the_host(temperature, batch_size):
    model = tiny_model()
    sampler = DeviceSampler(model, END, max_new_tokens=40, temperature=temperature)
    expected = on_host(model, GROUPS, 40, temperature, seed=3)
    assert len({len(tokens) for tokens in expected[0]}) > 1 or not temperature  # some end, some early
    check(sampler.sample(GROUPS, seed=3, batch_size=batch_size), expected)
    # Again, with the memory of the first time; and with other prompts in it.
    check(sampler.sample(GROUPS, seed=3, batch_size=batch_size), expected)
    check(sampler.sample(GROUPS[:4][::-1], seed=3), on_host(model, GROUPS[:4][::-1], 40, temperature, seed=3))


def test_samples_come_from_the_weights_as_they_are():
    model = tiny_model()
    sampler = DeviceSampler(model, END, max_new_tokens=20)
    before = sampler.sample(GROUPS)
    with torch.no_grad():
        model.lm_head.weight.copy_(tiny_model(seed=1).lm_head.weight)
    after = sampler.sample(GROUPS)
    assert tokens_of(after) != tokens_of(before)
    check(after, on_host(model, GROUPS, 20, 1.0))


def test_random_numbers_go_by_the_numbers_given():
    model = tiny_model()
    sampler = DeviceSampler(model, END, max_new_tokens=20)
    seeds = range(100, 100 + len(GROUPS))
    check(sampler.sample(GROUPS, seed=2, seeds=seeds), on_host(model, GROUPS, 20, 1.0, seed=2, seeds=seeds))
    part = sampler.sample(GROUPS[6:9], seed=2, seeds=seeds[6:9])
    assert tokens_of(part) == tokens_of(sampler.sample(GROUPS, seed=2, seeds=seeds))[6:9]


def test_several_samples_of_a_prompt_are_those_of_the_host():
    model = tiny_model()
    options = {"samples": 5, "seed": 4, "seeds": range(3, 10)}
    found = DeviceSampler(model, END, max_new_tokens=20, temperature=0.8).sample(
        tiny_prompts(), **options, batch_size=9
    )
    expected = sample_replies(
        model, "transformers", TOKENIZER, tiny_prompts(), max_new_tokens=20, temperature=0.8, **options
    )
    assert tokens_of(found) == tokens_of(expected)
    assert len({tuple(tokens) for of_prompt in tokens_of(found) for tokens in of_prompt}) > 7


def test_rows_that_have_ended_cost_no_further_passes(monkeypatch):
    model = counting_model()
    # Replies count up to 939 and end: one has 10 tokens left, one 200, the others few.
    prompts = [np.array([start]) for start in (930, 740, *[935] * 14)]
    sampler = DeviceSampler(model, END, max_new_tokens=300, temperature=0)
    rows = []
    step = sampler._step
    monkeypatch.setattr(sampler, "_step", lambda count: (rows.append(count), step(count)))
    found = sampler.sample(prompts)
    check(found, on_host(model, prompts, 300, 0))
    assert rows[0] == 16 and rows[-1] == 8  # half of the rows, not fewer than 8
    assert len(rows) < 200 + 2 * device_sampling.LOOK  # it ends when all have


def test_rows_that_go_on_are_a_half_or_a_quarter_of_all():
    alive = np.zeros(64, dtype=bool)
    alive[[3, 40, 41]] = True
    assert len(rows_to_keep(alive)) == 8 and set(rows_to_keep(alive)[:3]) == {3, 40, 41}
    alive[:20] = True
    assert len(rows_to_keep(alive)) == 32 and len(set(rows_to_keep(alive))) == 32
    alive[:40] = True
    assert rows_to_keep(alive).tolist() == list(range(64))
    assert len(rows_to_keep(np.zeros(6, dtype=bool))) == 6


def test_equal_prompts_stand_together():
    order, owners = by_prompt([np.array(p) for p in ([5], [6, 7], [5], [8], [6, 7], [5])])
    assert order.tolist() == [0, 2, 5, 1, 4, 3]
    assert owners.tolist() == [0, 0, 0, 1, 1, 2]


def test_memory_that_runs_out_halves_the_batch(monkeypatch, capsys):
    model = tiny_model()
    sampler = DeviceSampler(model, END, max_new_tokens=20)
    expected = on_host(model, GROUPS, 20, 1.0)
    part = sampler._sample

    def limited(prompts, draws):
        if len(prompts) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part(prompts, draws)

    monkeypatch.setattr(sampler, "_sample", limited)
    check(sampler.sample(GROUPS), expected)
    assert "going on with batches of 5" in capsys.readouterr().out


def test_what_the_model_does_not_know_is_refused():
    model = tiny_model()
    sampler = DeviceSampler(model, END, max_new_tokens=5)
    with pytest.raises(UndecodableModelError, match="has tokens from 1 to 6"):
        sampler.sample([np.array([1, 6])])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.sample([np.array([1]), np.array([], dtype=np.int64)])
    with torch.no_grad():
        model.lm_head.weight[2] = float("nan")
    with pytest.raises(UndecodableModelError, match="NaN"):
        sampler.sample([np.array([1])])


@pytest.mark.gpu
def test_graphs_give_the_samples_of_the_host():
    model = tiny_model(sharpness=3).cuda()
    prompts = [np.tile(prompt, 40 + 20 * i) for i, prompt in enumerate(tiny_prompts()) for _ in range(4)]
    for temperature in (0, 0.8):
        sampler = DeviceSampler(model, END, max_new_tokens=300, temperature=temperature)
        expected = on_host(model, prompts, 300, temperature)
        for batch_size in (len(prompts), 5):
            for _ in range(2):
                check(sampler.sample(prompts, batch_size=batch_size), expected, rel=1e-3)
        with torch.no_grad():
            model.lm_head.weight *= 0.9  # graphs see what has changed
        check(sampler.sample(prompts), on_host(model, prompts, 300, temperature), rel=1e-3)
