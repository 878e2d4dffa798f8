"""Search, sampling and scoring of replies against enumeration and plain loops; which grids are submitted."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from arc.decoding.greedy import generate_replies
from arc.decoding.rows import Work, halve_on_out_of_memory
from arc.decoding.sampling import sample_replies
from arc.decoding.scoring import score_replies
from arc.decoding.search import search_replies
from arc.evaluation.selection import RULES, Candidate, gather_candidates, select
from arc.models import loading, lora
from arc.models.loading import Precision
from arc.puzzles.dataset import ArcDataset
from arc.puzzles.text import can_become_grid, format_options
from tests.tiny_models import prepared_base

END = 0
TOKENIZER = SimpleNamespace(eos_token_id=END, pad_token_id=1)
LONGEST = 5


def tiny_model(sharpness=1.0, vocabulary=6, seed=0):
    """A random Llama that looks back; the sharper, the more probable its first choice."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.4, tie_word_embeddings=False,
            eos_token_id=END, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    return model


def tiny_prompts(count=7, vocabulary=6):
    rng = np.random.default_rng(1)
    return [rng.integers(1, vocabulary, size=length) for length in rng.permutation(np.arange(1, 3 * count, 3))]


def enumerate_replies(model, prompt, min_prob, longest=LONGEST):
    """All replies of up to `longest` tokens, by computing every sequence there is."""
    vocabulary = model.config.vocab_size
    others = [token for token in range(vocabulary) if token != END]
    paths = torch.tensor(list(itertools.product(others, repeat=longest - 1)), dtype=torch.long)
    ids = torch.cat([torch.from_numpy(prompt).expand(len(paths), -1), paths], dim=1)
    with torch.no_grad():
        found = torch.log_softmax(model(ids).logits[:, len(prompt) - 1 :].double(), -1)
    replies = {}
    for path, log_probs in zip(paths.tolist(), found, strict=True):
        total = 0.0
        for at in range(longest):
            replies[*path[:at], END] = total + float(log_probs[at, END])
            if at < longest - 1:
                total += float(log_probs[at, path[at]])
    return {reply: log_prob for reply, log_prob in replies.items() if log_prob >= math.log(min_prob)}


def plain_search(model, prompt, min_prob, longest):
    """Depth-first search as the public code does it: one sequence, recursion, one token a pass."""
    cache, replies = DynamicCache(), {}

    @torch.no_grad()
    def follow(path, ids, total):
        logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        length = cache.get_seq_length()
        log_probs = torch.log_softmax(logits.float(), -1)
        for token in torch.nonzero(log_probs >= math.log(min_prob) - total)[:, 0].tolist():
            if cache.get_seq_length() > length:
                cache.crop(length - cache.get_seq_length())
            if token == END_OF[id(model)]:
                replies[*path, token] = total + float(log_probs[token])
            elif len(path) + 2 <= longest:
                follow([*path, token], [token], total + float(log_probs[token]))

    follow([], prompt.tolist(), 0.0)
    return replies


END_OF = {}


def as_dict(replies):
    found = {tuple(reply.tokens.tolist()): reply.log_prob for reply in replies}
    assert len(found) == len(replies), "a reply was found twice"
    return found


def assert_same(replies, expected, tolerance=2e-5):
    found = as_dict(replies)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=tolerance)
    assert [reply.log_prob for reply in replies] == sorted(found.values(), reverse=True)


def guesses_for(kind, expected):
    """Right, wrong, cut, too long and no guesses."""
    rng = np.random.default_rng(5)
    made = []
    for i, replies in enumerate(expected):
        best = np.array(max(replies, key=replies.get, default=(1, 2, END)))
        choices = {
            "none": None,
            "right": best,
            "wrong": rng.integers(0, 6, size=4),
            "begin": best[: len(best) // 2],
            "beyond": np.array([1, 2, 3, 4, 5, 4, 3, 2, 1, 2, 3]),
        }
        made.append(choices[kind] if kind != "mixed" else list(choices.values())[i % 5])
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Search


@pytest.fixture(scope="module")
def looking_back():
    return tiny_model()


@pytest.mark.parametrize("min_prob", [0.5, 0.1, 0.02, 1e-3, 1e-4])
def test_search_finds_what_enumeration_finds(looking_back, min_prob):
    prompts = tiny_prompts()
    expected = [enumerate_replies(looking_back, prompt, min_prob) for prompt in prompts]
    counts = [len(replies) for replies in expected]
    assert max(counts) <= 1 / min_prob
    assert sum(counts) > {0.5: 0, 0.1: 4, 0.02: 20, 1e-3: 150, 1e-4: 400}[min_prob], "the test shows too little"
    for batch_size, kind, draft in [(1, "none", 16), (2, "right", 16), (3, "mixed", 2), (7, "wrong", 0)]:
        found = search_replies(
            looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=LONGEST, min_prob=min_prob,
            guesses=guesses_for(kind, expected), batch_size=batch_size, draft_tokens=draft,
        )  # fmt: skip
        for replies, known in zip(found, expected, strict=True):
            assert_same(replies, known)


@pytest.mark.parametrize("kind", ["none", "right", "wrong", "begin", "beyond", "mixed"])
def test_search_does_not_depend_on_guesses_and_batches(looking_back, kind):
    prompts = tiny_prompts()
    expected = [enumerate_replies(looking_back, prompt, 0.01) for prompt in prompts]
    for batch_size in range(1, 8):
        found = search_replies(
            looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=LONGEST, min_prob=0.01,
            guesses=guesses_for(kind, expected), batch_size=batch_size,
        )  # fmt: skip
        for replies, known in zip(found, expected, strict=True):
            assert_same(replies, known)


def test_shortest_replies_and_equal_prompts(looking_back):
    prompt = tiny_prompts()[0]
    for longest in (1, 2):
        expected = enumerate_replies(looking_back, prompt, 1e-3, longest)
        assert expected
        work = Work()
        for replies in search_replies(
            looking_back, "transformers", TOKENIZER, [prompt] * 4, max_new_tokens=longest, min_prob=1e-3, work=work
        ):
            assert_same(replies, expected)
        assert work.prompt_tokens == len(prompt) - 1  # its last token is fed with the reply
    assert search_replies(looking_back, "transformers", TOKENIZER, [], max_new_tokens=3) == []


def test_many_tokens_many_replies_and_a_large_vocabulary():
    model = tiny_model(sharpness=0.6, vocabulary=40, seed=3)
    END_OF[id(model)] = END
    prompts = tiny_prompts(12, vocabulary=40)
    found = search_replies(
        model, "transformers", TOKENIZER, prompts, max_new_tokens=6, min_prob=5e-4, batch_size=5, draft_tokens=3
    )
    expected = [plain_search(model, prompt, 5e-4, 6) for prompt in prompts]
    assert sum(map(len, expected)) > 100
    for replies, known in zip(found, expected, strict=True):
        assert_same(replies, known)


def test_a_certain_model_gives_its_greedy_reply_in_few_passes():
    model = tiny_model(sharpness=12, seed=2)
    prompts = tiny_prompts(20)
    greedy = generate_replies(model, "transformers", TOKENIZER, prompts, 40)
    scores = score_replies(model, "transformers", TOKENIZER, prompts, greedy)
    sure = [i for i in range(20) if greedy[i][-1] == END and scores[i] > math.log(0.5)]
    assert len(sure) >= 3, "the test shows too little"
    chosen = {"prompts": [prompts[i] for i in sure], "max_new_tokens": 40, "min_prob": 0.5}
    right, none = Work(), Work()
    for work, guesses in ((right, [greedy[i] for i in sure]), (none, None)):
        found = search_replies(model, "transformers", TOKENIZER, **chosen, guesses=guesses, work=work)
        for i, replies in zip(sure, found, strict=True):
            assert_same(replies, {tuple(greedy[i].tolist()): scores[i]}, 1e-4)
    assert right.passes == 2  # the prompts, and all guesses at once
    assert none.passes > right.passes
    assert right.prompt_tokens == none.prompt_tokens == sum(len(prompts[i]) - 1 for i in sure)


def counting_model(forks=(), numbers=940, layers=1):
    """A Llama that counts up to 939 and ends; after a fork another token comes instead with probability 0.3."""
    torch.manual_seed(0)
    hidden = numbers + 20
    vocabulary = numbers + len(forks)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=8, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
            eos_token_id=END, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, hidden))
        head = model.lm_head.weight.zero_()
        size = hidden**0.5  # of a token's own component behind the norm
        for token in range(numbers):
            head[(token + 1) % numbers, token] = 18 / size
        for other, fork in enumerate(forks, numbers):
            head[other, fork] = (18 + math.log(0.3 / 0.7)) / size
            head[fork + 2, other] = 18 / size
        # Looking back changes a little: enough to show a wrong cache.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.zero_()
    return model


def loop_score(model, prompt, reply):
    ids = torch.from_numpy(np.concatenate([prompt, reply]))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
    places = torch.arange(len(prompt) - 1, len(ids) - 1)
    return float(log_probs[places, ids[places + 1]].sum())


def test_a_reply_of_931_tokens():
    model = counting_model()
    prompts = [np.array([9]), np.array([5, 7, 4, 9]), np.arange(600, 910)]
    options = {"model": model, "engine": "transformers", "tokenizer": TOKENIZER, "prompts": prompts}
    expected = [np.array([*range(prompt[-1] + 1, 940), END]) for prompt in prompts]
    assert len(expected[0]) == 931
    work = Work()
    for replies, known, prompt in zip(
        search_replies(**options, max_new_tokens=931, work=work), expected, prompts, strict=True
    ):
        assert_same(replies, {tuple(known.tolist()): loop_score(model, prompt, known)}, 1e-4)
    assert work.passes == 932
    assert [len(replies) for replies in search_replies(**options, max_new_tokens=930)] == [0, 0, 1]


def test_replies_that_differ_in_single_cells_cost_few_passes():
    forks = (600, 700, 800, 900)
    model = counting_model(forks)
    prompt, main = np.array([9]), np.array([*range(10, 940), END])
    others = []
    for chosen in itertools.product((False, True), repeat=4):
        others.append(main.copy())
        for fork, number, is_other in zip(forks, range(940, 944), chosen, strict=True):
            if is_other:
                others[-1][fork + 1 - 10] = number
    expected = {tuple(reply.tolist()): loop_score(model, prompt, reply) for reply in others}
    # 0.7^4, four of 0.3 x 0.7^3, six of 0.3^2 x 0.7^2 = 0.044
    expected = {reply: log_prob for reply, log_prob in expected.items() if log_prob > math.log(0.04)}
    assert len(expected) == 11
    passes = {}
    for draft in (0, 16, 64):
        work = Work()
        [found] = search_replies(
            model, "transformers", TOKENIZER, [prompt], max_new_tokens=931, min_prob=0.04, guesses=[main],
            draft_tokens=draft, work=work,
        )  # fmt: skip
        assert_same(found, expected, 1e-4)
        passes[draft] = work.passes
    assert passes[0] > 1000
    assert passes[64] < passes[16] < passes[0] / 8


def test_a_guess_whose_first_token_is_wrong_still_helps():
    model, prompt, reply = counting_model(), np.array([9]), np.array([*range(10, 940), END])
    guess, work = reply.copy(), Work()
    guess[0] = 5
    options = {"max_new_tokens": 931, "draft_tokens": 32, "guesses": [guess], "work": work}
    [[found]] = search_replies(model, "transformers", TOKENIZER, [prompt], **options)
    assert found.tokens.tolist() == reply.tolist()
    assert work.passes < 2 * 931 / 32
    # What each pass has seen: all before it, and what it was fed.
    assert work.seen_tokens > work.reply_tokens >= len(reply)


def test_the_batch_stays_full_and_results_come_as_they_are_ready():
    model = counting_model()
    prompts = [np.array([number]) for number in (930, 830, 935, 834, 938, 839, 937, 840)]
    work, ready = Work(), []
    search_replies(
        model, "transformers", TOKENIZER, prompts, max_new_tokens=200, batch_size=3, work=work,
        done=lambda number, replies: ready.append((number, len(replies[0].tokens))),
    )  # fmt: skip
    assert sorted(ready) == [(i, 940 - prompt[0]) for i, prompt in enumerate(prompts)]
    assert [number for number, _ in ready] != sorted(number for number, _ in ready)
    # All the tokens there are, in rows of three: were the batch to wait for its longest row, it would be 330.
    assert sum(tokens for _, tokens in ready) / 3 < work.passes < 240


def test_four_bits_and_adapters(tmp_path):
    base = prepared_base(tmp_path)
    for precision in (Precision("transformers", "float32", True), Precision("transformers", "float32", False)):
        model, tokenizer = loading.load_model(base, precision)
        if not precision.load_in_4bit:
            model = lora.add_lora(model, precision, r=4)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.5)
        prompts = [np.array(tokenizer(text)["input_ids"]) for text in ("I12\n3", "I123\n+/-=O", "xyz")]
        model.train()
        found = search_replies(model, "transformers", tokenizer, prompts, max_new_tokens=2, min_prob=1e-4, batch_size=2)
        assert model.training
        model.eval()
        END_OF[id(model)] = tokenizer.eos_token_id
        for replies, prompt in zip(found, prompts, strict=True):
            assert_same(replies, plain_search(model, prompt, 1e-4, 2))
        assert sum(map(len, found)) > 6
        replies = [reply.tokens for replies in found for reply in replies]
        repeated = [prompt for prompt, replies in zip(prompts, found, strict=True) for _ in replies]
        scores = score_replies(model, "transformers", tokenizer, repeated, replies, batch_size=2)
        assert scores == pytest.approx([reply.log_prob for replies in found for reply in replies], abs=2e-5)


def test_16_bit_models_give_what_float32_gives_within_rounding(looking_back):
    model = tiny_model().bfloat16()
    prompts = tiny_prompts()
    found = search_replies(model, "transformers", TOKENIZER, prompts, max_new_tokens=LONGEST, min_prob=0.005)
    for replies, prompt in zip(found, prompts, strict=True):
        exact = enumerate_replies(looking_back, prompt, 1e-5)
        found = as_dict(replies)
        assert found == pytest.approx({reply: exact[reply] for reply in found}, abs=0.5)
        assert {reply for reply, log_prob in exact.items() if log_prob > math.log(0.009)} <= found.keys()


def test_what_cannot_be_searched_is_refused(looking_back):
    prompt = np.array([1, 2])
    options = {"max_new_tokens": 3}
    for engine, more, text in [
        ("unsloth", {}, "--engine transformers"),
        ("transformers", {"min_prob": 0}, "min_prob is 0"),
        ("transformers", {"min_prob": 1.1}, "min_prob is 1.1"),
        ("transformers", {"batch_size": 0}, "batch_size"),
        ("transformers", {"max_new_tokens": 0}, "max_new_tokens"),
        ("transformers", {"guesses": []}, "0 guesses for 1 prompts"),
        ("transformers", {"guesses": [[6]]}, "guess 0 has tokens from 6 to 6, the model 6"),
    ]:
        with pytest.raises(ValueError, match=text):
            search_replies(looking_back, engine, TOKENIZER, [prompt], **{**options, **more})
    for wrong, text in [([], "prompt 1 is empty"), ([1, -1], "prompt 1 has tokens from -1 to 1")]:
        with pytest.raises(ValueError, match=text):
            search_replies(looking_back, "transformers", TOKENIZER, [prompt, np.array(wrong)], **options)
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="do not see their whole context"):
        search_replies(sliding, "transformers", TOKENIZER, [prompt], **options)
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        search_replies(broken, "transformers", TOKENIZER, [prompt], **options)
    with pytest.raises(ValueError, match="NaN"):
        score_replies(broken, "transformers", TOKENIZER, [prompt], [prompt])
    assert looking_back.config._attn_implementation == broken.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


def limit_rows(model, rows, free_passes=0):
    """Let the model run out of memory at more rows than that, after some passes that fit."""
    seen = []

    def check(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > rows and len(seen) > free_passes:
            raise torch.OutOfMemoryError("no room")

    return seen, model.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("free_passes", range(0, 37, 4))
def test_out_of_memory_halves_the_batch_and_loses_nothing(looking_back, capsys, free_passes):
    prompts = tiny_prompts()
    expected = [enumerate_replies(looking_back, prompt, 0.01) for prompt in prompts]
    ready = []
    seen, hook = limit_rows(looking_back, 2, free_passes)
    try:
        found = search_replies(
            looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=LONGEST, min_prob=0.01, batch_size=5,
            guesses=guesses_for("mixed", expected), done=lambda number, _: ready.append(number),
        )  # fmt: skip
    finally:
        hook.remove()
    for replies, known in zip(found, expected, strict=True):
        assert_same(replies, known)
    assert sorted(ready) == list(range(len(prompts)))
    notes = capsys.readouterr().out.splitlines()
    assert notes == ["out of memory: going on with batches of 2"] * len(notes)
    assert len(notes) == (max(seen[free_passes:], default=0) > 2)


def test_scores_and_samples_survive_it_too_but_one_row_has_to_fit(looking_back):
    prompts = tiny_prompts()
    replies = [np.array([1, 2, END])] * 7
    expected = score_replies(looking_back, "transformers", TOKENIZER, prompts, replies)
    samples = sample_replies(looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=9)
    _, hook = limit_rows(looking_back, 1)
    try:
        scores = score_replies(looking_back, "transformers", TOKENIZER, prompts, replies)
        assert scores == pytest.approx(expected, abs=2e-5)
        again = sample_replies(looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=9)
        assert [as_dict(a) for a in again] == [pytest.approx(as_dict(b), abs=2e-5) for b in samples]
    finally:
        hook.remove()
    _, hook = limit_rows(looking_back, 0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            search_replies(looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=2)
    finally:
        hook.remove()
    assert halve_on_out_of_memory(lambda size: size, 3) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_scores_are_those_of_a_plain_loop(looking_back, engine, batch_size, monkeypatch):
    # What is done for Unsloth's sake, padding without a mask, is plain torch and can be shown without it.
    monkeypatch.setattr("arc.decoding.scoring.decoding", lambda model, engine: torch.no_grad())
    rng = np.random.default_rng(3)
    prompts, replies = [], []
    for prompt in tiny_prompts():
        for _ in range(rng.integers(1, 9)):
            prompts.append(prompt)
            replies.append(rng.integers(0, 6, size=rng.integers(1, 12)))
    order = rng.permutation(len(prompts))
    prompts, replies = [prompts[i] for i in order], [replies[i] for i in order]
    work = Work()
    scores = score_replies(looking_back, engine, TOKENIZER, prompts, replies, batch_size=batch_size, work=work)
    expected = [loop_score(looking_back, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    assert scores == pytest.approx(expected, abs=2e-5)
    if engine == "transformers":
        assert work.prompt_tokens < sum(map(len, prompts))
    assert score_replies(looking_back, engine, TOKENIZER, [], []) == []


def test_scores_of_what_the_search_found(looking_back):
    prompts = tiny_prompts()
    found = search_replies(looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=LONGEST, min_prob=0.01)
    pairs = [(prompt, reply) for prompt, replies in zip(prompts, found, strict=True) for reply in replies]
    scores = score_replies(
        looking_back, "transformers", TOKENIZER, [prompt for prompt, _ in pairs], [reply.tokens for _, reply in pairs]
    )
    assert scores == pytest.approx([reply.log_prob for _, reply in pairs], abs=2e-5)
    for prompts, replies, text in [([], [[1]], "0 prompts for 1"), ([[1]], [[]], "reply 0 is empty")]:
        with pytest.raises(ValueError, match=text):
            score_replies(looking_back, "transformers", TOKENIZER, prompts, replies)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_samples_follow_the_probabilities(looking_back):
    prompt = max(tiny_prompts(), key=len)
    exact = enumerate_replies(looking_back, prompt, 0.01)
    work = Work()
    [found] = sample_replies(
        looking_back, "transformers", TOKENIZER, [prompt], max_new_tokens=LONGEST, samples=2000, seed=4,
        batch_size=500, work=work,
    )  # fmt: skip
    shares = {}
    for reply in found:
        ids = tuple(reply.tokens.tolist())
        shares[ids] = shares.get(ids, 0) + 1 / len(found)
        assert (ids[-1] == END) or len(ids) == LONGEST
        if ids in exact:
            assert reply.log_prob == pytest.approx(exact[ids], abs=2e-5)
    for ids, log_prob in exact.items():
        probability = math.exp(log_prob)
        assert abs(shares.get(ids, 0) - probability) < 4.5 * math.sqrt(probability / len(found))
    assert work.prompt_tokens < 2000 * (len(prompt) - 1) / 10


def test_samples_are_given_by_the_seed_alone(looking_back):
    prompts = tiny_prompts()
    options = {"max_new_tokens": 12, "samples": 3, "temperature": 0.8}

    def tokens(**more):
        found = sample_replies(looking_back, "transformers", TOKENIZER, prompts, **options, **more)
        return [[reply.tokens.tolist() for reply in replies] for replies in found]

    once = tokens(seed=1)
    assert [len(replies) for replies in once] == [3] * 7
    assert once == tokens(seed=1) == tokens(seed=1, batch_size=1) == tokens(seed=1, batch_size=5)
    assert once != tokens(seed=2)
    assert len({tuple(reply) for replies in once for reply in replies}) > 10


def test_temperature_0_is_greedy():
    model = tiny_model(sharpness=3)
    prompts = tiny_prompts()
    expected = generate_replies(model, "transformers", TOKENIZER, prompts, 30)
    found = sample_replies(
        model, "transformers", TOKENIZER, prompts, max_new_tokens=30, temperature=0, samples=2, batch_size=3
    )
    for replies, known in zip(found, expected, strict=True):
        assert [reply.tokens.tolist() for reply in replies] == [known.tolist()] * 2
    scores = score_replies(model, "transformers", TOKENIZER, prompts, expected)
    assert [replies[0].log_prob for replies in found] == pytest.approx(scores, abs=1e-4)
    for wrong in ({"samples": 0}, {"temperature": -1}, {"temperature": math.inf}, {"seed": -1}):
        with pytest.raises(ValueError, match="samples, temperature and seed"):
            sample_replies(model, "transformers", TOKENIZER, prompts, max_new_tokens=3, **wrong)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("kind", ["right", "wrong", "begin", "beyond", "mixed"])
def test_guesses_change_no_sample_and_save_passes(looking_back, temperature, kind):
    prompts = tiny_prompts()
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3, "batch_size": 4}

    def sample(**more):
        work = Work()
        found = sample_replies(looking_back, "transformers", TOKENIZER, prompts, **options, **more, work=work)
        return [replies[0] for replies in found], work

    plain, dear = sample()
    expected = [{tuple(reply.tokens.tolist()): reply.log_prob} for reply in plain]
    for draft in (0, 2, 32):
        guessed, work = sample(guesses=guesses_for(kind, expected), draft_tokens=draft)
        assert [reply.tokens.tolist() for reply in guessed] == [reply.tokens.tolist() for reply in plain]
        assert [reply.log_prob for reply in guessed] == pytest.approx([reply.log_prob for reply in plain], abs=1e-5)
        if kind == "right" and draft:
            assert work.passes < dear.passes / 2
    with pytest.raises(ValueError, match="found 1 guesses for 7 prompts"):
        sample(guesses=[None])


def test_a_hopeless_reply_is_given_up():
    model = counting_model()
    asked = []

    def hopeless(path):
        asked.append(len(path))
        return len(path) > 60

    prompt = np.array([20, 21])
    [[reply]] = sample_replies(
        model, "transformers", TOKENIZER, [prompt], max_new_tokens=500, temperature=0, hopeless=hopeless
    )
    [[whole]] = sample_replies(model, "transformers", TOKENIZER, [prompt], max_new_tokens=500, temperature=0)
    assert asked == [32, 64]
    assert reply.tokens.tolist() == whole.tokens.tolist()[:64]
    assert len(whole.tokens) == 500


@pytest.mark.parametrize(
    ("text", "can"),
    [
        ("", True), ("1", True), ("12\n3", True), ("12\n34\n", True), ("1" * 30, True), ("1\n" * 29 + "1", True),
        ("1" * 31, False), ("1\n" * 30 + "1", False), ("12\n3\n4", False), ("12\n345", False), ("12\n\n", False),
        ("a", False), ("12 ", False), ("\n", False), ("١", False), ("1\n" * 30, True),
    ],
)  # fmt: skip
def test_what_can_become_a_grid(text, can):
    assert can_become_grid(text, "\n") == can


# ---------------------------------------------------------------------------------------------------------------------
# Selection

A, B, C, D = (np.array(cells, dtype=np.uint8) for cells in ([[1]], [[2]], [[1, 2]], [[3], [4]]))


def log(*probabilities):
    return [math.log(probability) for probability in probabilities]


def table():
    """Three views; probabilities of A: 0.5, 0.2, -; B: 0.3, 0.6, 0.2; C: -, -, 0.7; D: 0.1, -, -."""
    views = [
        [(A, math.log(0.5)), (B, math.log(0.3)), (D, math.log(0.1))],
        [(B, math.log(0.6)), (None, math.log(0.1)), (A, math.log(0.2))],
        [(C, math.log(0.7)), (B, math.log(0.15)), (B, math.log(0.05))],
    ]
    candidates = gather_candidates(views)
    for candidate, scored in zip(
        candidates, [log(0.5, 0.2, 0.01), log(0.3, 0.6, 0.2), log(0.1, 1e-4, 1e-4), log(0.05, 0.1, 0.7)], strict=True
    ):
        candidate.scored = scored
    return candidates


def names(grids):
    known = {(grid.shape, grid.tobytes()): name for name, grid in zip("ABCD", (A, B, C, D), strict=True)}
    return "".join(known[grid.shape, grid.tobytes()] for grid in grids)


def test_candidates_are_merged():
    candidates = table()
    assert names(candidate.grid for candidate in candidates) == "ABDC"
    found = [{view: round(math.exp(p), 9) for view, p in candidate.found.items()} for candidate in candidates]
    assert found == [{0: 0.5, 1: 0.2}, {0: 0.3, 1: 0.6, 2: 0.2}, {0: 0.1}, {2: 0.7}]
    assert gather_candidates([]) == gather_candidates([[], [(None, -1.0)]]) == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("first_view", "ABD"),  # 0.5, 0.3, 0.1
        ("max", "CBAD"),  # 0.7, 0.6, 0.5, 0.1
        ("sum", "BACD"),  # 1.1, 0.7 and first by its cells, 0.7, 0.1
        ("product", "BCAD"),  # 0.036, 0.0035, 0.001, 1e-9
        ("majority", "BACD"),  # a vote each, by their sums; none
    ],
)
def test_rules(rule, expected):
    for candidates in itertools.permutations(table()):
        assert names(select(candidates, rule)) == expected[:2]
        assert names(select(candidates, rule, count=9)) == expected
    assert select([], rule) == []
    assert names(select(table()[:1], rule)) == "A"


def test_majority_counts_views():
    views = [[(A, math.log(0.2))], [(A, math.log(0.2)), (B, math.log(0.1))], [(B, math.log(0.9))]]
    assert names(select(gather_candidates(views), "majority")) == "AB"
    assert names(select(gather_candidates(views), "sum")) == "BA"


def test_ties_do_not_depend_on_the_order():
    for views in itertools.permutations([[(A, -1.0)], [(B, -1.0)], [(C, -1.0)], [(D, -1.0)]]):
        for rule in ("max", "sum", "majority"):
            assert names(select(gather_candidates(views), rule, count=4)) == "ABCD"


def test_wrong_rules_and_missing_scores():
    assert set(RULES) == {"first_view", "max", "sum", "product", "majority"}
    with pytest.raises(ValueError, match="no rule 'best'"):
        select(table(), "best")
    with pytest.raises(ValueError, match="1 of 1 candidates have not been scored"):
        select([Candidate(A, {0: -1.0})], "product")


def test_views_of_a_puzzle_are_mapped_back_and_merged():
    pairs = [{"input": [[1, 2], [3, 4]], "output": [[2, 1, 0], [4, 3, 5]]}]
    dataset = ArcDataset({"aa": {"train": pairs, "test": [{"input": [[5, 6]]}]}}, {"aa": [[[6, 5, 7], [0, 0, 1]]]})
    options = format_options("$")
    keys = ["aa_0", "aa_0.tp", "aa_0.rt.perm1234567890", "aa_0.tp.rt.rt.perm9876543210"]
    views = []
    for key in keys:
        text = ArcDataset.fmt_output(dataset[key]["solution"], options["reply_end"], lines_sep="\n")
        grid, correct, _ = dataset.decode(text, "\n", key=key, reply_end=options["reply_end"])
        assert correct
        views.append([(grid, math.log(0.5)), (dataset.decode("12", "\n", key="aa_0")[0], math.log(0.2))])
    first, second = gather_candidates(views)
    assert first.grid.tolist() == [[6, 5, 7], [0, 0, 1]]
    assert first.found == pytest.approx(dict.fromkeys(range(4), math.log(0.5)))
    assert [grid.tolist() for grid in select([second, first], "sum")] == [first.grid.tolist(), [[1, 2]]]


def test_masks_of_one_pass_are_bounded(looking_back, monkeypatch):
    """Rows of a pass become fewer where their masks would be too large; what comes out is the same."""
    prompts = [np.tile(prompt, 4) for prompt in tiny_prompts()]
    replies = [np.array([1, 2, 3, END])] * 7
    options = {"max_new_tokens": 9, "min_prob": 0.02, "guesses": [np.array([1, 2, 3, 4, 5, 1, 2])] * 7, "batch_size": 7}
    scores = score_replies(looking_back, "transformers", TOKENIZER, prompts, replies)
    found = search_replies(looking_back, "transformers", TOKENIZER, prompts, **options)
    width = max(map(len, prompts)) + 3
    monkeypatch.setattr(
        "arc.decoding.rows.MASK_BYTES", 2 * 13 * width * width
    )  # two query heads share keys: 1 + 2 * (2 + 4)
    seen, hook = limit_rows(looking_back, 99)
    try:
        again = score_replies(looking_back, "transformers", TOKENIZER, prompts, replies)
        assert seen[0] == 2 and max(seen) > 2  # the longest come first
        monkeypatch.setattr("arc.decoding.rows.MASK_BYTES", 1)
        del seen[:]
        one_by_one = search_replies(looking_back, "transformers", TOKENIZER, prompts, **options)
        assert set(seen[1:]) == {1}  # after the prompts, which need no mask
    finally:
        hook.remove()
    assert again == pytest.approx(scores, abs=2e-5)
    for one, other in zip(one_by_one, found, strict=True):
        assert_same(one, as_dict(other))


def test_the_batch_that_fitted_is_told(looking_back):
    prompts, work = tiny_prompts(), Work()
    search_replies(looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=3, batch_size=7, work=work)
    assert work.batch_size is None
    _, hook = limit_rows(looking_back, 2)
    try:
        search_replies(looking_back, "transformers", TOKENIZER, prompts, max_new_tokens=3, batch_size=7, work=work)
        assert work.batch_size == 1
    finally:
        hook.remove()
