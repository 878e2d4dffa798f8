"""Merging, the proof of a merge, and what it catches, on models small enough for any machine."""

import dataclasses
import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from arc.decoding import greedy as greedy_module
from arc.merging import merge as merge_module
from arc.merging import plan as plan_module
from arc.merging import probe as probe_module
from arc.merging import proof as proof_module
from arc.models import loading, manifests
from arc.models import lora as lora_module
from arc.models import vocabulary as vocabulary_module
from arc.models import weights as weights_module
from arc.models.loading import Precision
from arc.models.lora import EMBEDDING_MODULES, LINEAR_MODULES
from arc.models.weights import MergeError
from tests.tiny_models import divergence, logits_of, prepared_base, train_a_little

PRECISIONS = [
    Precision("transformers", dtype, four) for dtype in ("float32", "bfloat16", "float16") for four in (False, True)
]
ALL = LINEAR_MODULES + EMBEDDING_MODULES
FOUR_BITS = Precision("transformers", "bfloat16", True)
SIXTEEN_BITS = Precision("transformers", "float32", False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Prepared bases by (tied, full_vocab)."""
    return {
        (tied, full): prepared_base(tmp_path_factory.mktemp("base"), tied, full)
        for tied in (True, False)
        for full in (True, False)
    }


def train_adapter(folder, base, precision, targets=ALL, steps=12, probe_rows=4, **lora):
    """Train on a few puzzles and save, with a probe, as a stage does; returns the trained model."""
    model, tokenizer = loading.load_model(base, precision)
    model = lora_module.add_lora(model, precision, target_modules=targets, r=8, **lora)
    rows = probe_module.make_probe_rows(tokenizer)
    train_a_little(model, precision, torch.tensor(np.stack([row["input_ids"][:80] for row in rows])).long(), steps)
    folder.mkdir()
    lora_module.save_adapter(model, tokenizer, folder, base=base, precision=precision)
    if probe_rows:
        path = folder / probe_module.PROBE
        probe_module.record_probe(model, "transformers", tokenizer, rows[:probe_rows], path, greedy_rows=2)
    return model


def merged(lora, **options):
    """A new folder beside an adapter's, with the merge."""
    out = lora.with_name("-".join(["merged", *map(str, options.values())]))
    out.mkdir()
    merge_module.merge_adapter(lora, out, **options)
    return out


def edit_tensors(folder, change, name="model.safetensors"):
    """Change the tensors of a folder: by a function that gives others, or changes those of a dict."""
    tensors = load_file(folder / name)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name, {"format": "pt"})


def edit_json(path, **values):
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------------------------------------------------------------
# Right merges


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.dtype}-{'4bit' if p.load_in_4bit else '16bit'}")
@pytest.mark.parametrize("targets", [ALL, LINEAR_MODULES], ids=["embeddings", "linear"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merge_is_the_model_that_was_trained(tmp_path, bases, tied, targets, precision):
    base = bases[tied, False]
    ids = torch.randint(0, 74, (4, 40), generator=torch.Generator().manual_seed(0))
    lora, out = tmp_path / "lora", tmp_path / "merged"
    # float16 is slow on a CPU.
    model = train_adapter(lora, base, precision, targets, steps=5 if precision.dtype == "float16" else 12)
    trained = logits_of(model, ids)
    out.mkdir()
    done = merge_module.merge_and_check(lora, out)
    json.dumps(done, allow_nan=False)

    check = done.pop("check")
    dtype = "float16" if precision.dtype == "float16" else "bfloat16"
    onto = "quantised" if precision.load_in_4bit else "16-bit"
    assert done == {"merge_base": "quantised", "merged_onto": onto, "dtype": dtype}
    assert check["prompts"] == 4 and check["positions"] == 128
    assert check["adapter_kl"] > 1e-2  # there was something to merge
    assert 0 < check["kl"] < check["kl_bound"] < 1e-4
    # The order of a sum, which is the CPU's, decides a few weights: of these small models, float16 has hardly others to
    # err by: up to 11%, with plain kernels (ATEN_CPU_CAPABILITY=default). Of bfloat16 models one is 2.8% off with those
    # of AVX-512, and none more than 0.3% with AVX2's. What a merge must keep to is kl_bound, above.
    assert check["kl"] == pytest.approx(check["kl_rounding"], rel=0.5 if dtype == "float16" else 0.12, abs=1e-10)
    assert check["trained_kl"] < 2e-3  # a model in 16 bits calculates less exactly than it is stored
    assert check["top1"] > 0.97 and check["trained_top1"] > 0.97 and check["trained_greedy"] in (0, 0.5, 1)
    assert 0 < check["largest_weight_error"] <= 1
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert saved.dtype == getattr(torch, dtype)
    assert check["weights"] == sum(p.numel() for p in saved.parameters())
    shared = saved.get_input_embeddings().weight.data_ptr() == saved.get_output_embeddings().weight.data_ptr()
    assert shared is tied
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}

    # Plain transformers loads the merge, plain peft the adapter onto the folder that it names, in 32 bits; loaded as in
    # training, the adapter gives the trained model itself.
    from peft import PeftConfig, PeftModel

    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert divergence(trained, logits_of(again, ids)) < 2e-3
    named = PeftConfig.from_pretrained(lora).base_model_name_or_path
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32), lora)
    assert divergence(trained, logits_of(plain, ids)) < (0.1 if precision.load_in_4bit else 2e-3)
    manifest = manifests.read_manifest(lora)
    if precision.load_in_4bit:
        recorded = BitsAndBytesConfig(**manifest["quantization"])
        assert recorded.to_dict() == loading.quantization_config(precision).to_dict()
    same, _ = loading.load_model(named, Precision(**manifest["precision"]))
    same = PeftModel.from_pretrained(same, lora)
    probe = probe_module.read_probe(lora)
    # In training, hooks keep the activations in 16 bits beside an embedding in float32; plain peft has none.
    limit = 1e-10 if precision.dtype == "float32" else 1e-4
    assert divergence(trained, logits_of(same, ids)) < limit
    assert divergence(probe.log_probabilities, probe_module.probe_answers(same.eval(), probe)) < limit


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_merge_with_the_whole_vocabulary_passes(tmp_path, bases, tied):
    train_adapter(tmp_path / "lora", bases[tied, True], FOUR_BITS, lora_alpha=8)
    (tmp_path / "merged").mkdir()
    check = merge_module.merge_and_check(tmp_path / "lora", tmp_path / "merged")["check"]
    assert check["prompts"] == 4 and check["trained_kl"] < 2e-3


def as_unsloth_saves(lora, tied, regular_expression):
    """Rewrite the settings of the transformers engine's adapter as Unsloth writes them; the tensors are the same."""
    named = "(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))"
    edit_json(
        lora / "adapter_config.json",
        target_modules=named if regular_expression else list(LINEAR_MODULES),
        modules_to_save=["embed_tokens"] if tied else ["embed_tokens", "lm_head"],
        ensure_weight_tying=tied,
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True},
    )


@pytest.mark.parametrize("regular_expression", [True, False])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_as_unsloth_saves_it_passes(tmp_path, bases, tied, regular_expression):
    lora = tmp_path / "lora"
    train_adapter(lora, bases[tied, False], FOUR_BITS)
    edit_json(lora / manifests.MANIFEST, precision=dataclasses.asdict(dataclasses.replace(FOUR_BITS, engine="unsloth")))
    as_unsloth_saves(lora, tied, regular_expression)
    check = proof_module.check_merge(lora, merged(lora))
    assert check["trained_kl"] < 2e-3 and check["adapter_kl"] > 1e-2


def test_an_adapter_without_rslora_and_without_a_probe_passes(tmp_path, bases):
    lora = tmp_path / "lora"
    train_adapter(lora, bases[True, False], SIXTEEN_BITS, use_rslora=False, probe_rows=0)
    check = proof_module.check_merge(lora, merged(lora))
    assert check["prompts"] == 16 and check["adapter_kl"] > 1e-2
    assert check["trained_kl"] is check["trained_top1"] is check["trained_greedy"] is None


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "embed_tokens", "lm_head"], {}),
        (["q_proj", "o_proj"], {"bias": "lora_only"}),
    ],
    ids=["embeddings", "trained biases"],
)
def test_other_adapters_are_added_up(tmp_path, targets, options):
    from peft import LoraConfig, get_peft_model

    base, lora = prepared_base(tmp_path, tied=False, attention_bias=True), tmp_path / "lora"
    model, tokenizer = loading.load_model(base, SIXTEEN_BITS)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    ids = probe_module.make_probe_rows(tokenizer)[0]["input_ids"]
    train_a_little(model, SIXTEEN_BITS, torch.from_numpy(ids[None]).long())
    lora.mkdir()
    lora_module.save_adapter(model, tokenizer, lora, base=base, precision=SIXTEEN_BITS)
    out = merged(lora)
    assert proof_module.check_merge(lora, out)["adapter_kl"] > 1e-2
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(out, lambda tensors: tensors[name].add_(0.1))
    with pytest.raises(MergeError, match=rf"^{name}\[\d+\] of "):
        proof_module.check_merge(lora, out)


def test_an_adapter_on_a_tied_matrix_by_low_rank_cannot_be_merged(tmp_path, bases):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loading.load_model(bases[True, False], SIXTEEN_BITS)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    lora_module.save_adapter(model, tokenizer, tmp_path / "lora", base=bases[True, False], precision=SIXTEEN_BITS)
    out = merged(tmp_path / "lora")
    with pytest.raises(MergeError, match="low-rank change of one of two tied matrices.*untie the base"):
        proof_module.check_merge(tmp_path / "lora", out)


def test_the_original_merge_base_differs_from_the_quantised_one_by_the_quantisation(tmp_path, bases):
    lora = tmp_path / "lora"
    train_adapter(lora, bases[True, False], Precision("transformers", "float32", True))
    apart = {}
    for merge_base in ("quantised", "original"):
        out = merged(lora, merge_base=merge_base)
        check = proof_module.check_merge(lora, out, merge_base=merge_base)
        apart[merge_base] = check["trained_kl"]
        other = {"quantised": "original", "original": "quantised"}[merge_base]
        with pytest.raises(MergeError, match="half ulps of bfloat16, where rounding explains 1"):
            proof_module.check_merge(lora, out, merge_base=other)
    assert apart["quantised"] < 1e-5
    assert apart["original"] > 10 * apart["quantised"]


def test_merge_base_must_be_known_and_recorded(tmp_path, bases):
    model, tokenizer = loading.load_model(bases[True, False], SIXTEEN_BITS)
    model = lora_module.add_lora(model, SIXTEEN_BITS, r=4)
    lora = tmp_path / "lora"
    lora_module.save_adapter(model, tokenizer, lora, base=bases[True, False], precision=SIXTEEN_BITS)
    with pytest.raises(ValueError, match="'quantised' or 'original'"):
        merge_module.merge_adapter(lora, tmp_path, merge_base="other")
    shutil.move(lora / manifests.MANIFEST, tmp_path)
    with pytest.raises(ValueError, match="does not record.*--merge_base original"):
        merge_module.merge_adapter(lora, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        merge_module.merge_adapter(bases[True, False], tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong merges: what each check says on its own


@dataclasses.dataclass
class Pair:
    """A trained adapter, its right merge, and the base that it was merged onto."""

    lora: object
    right: object
    base: object
    precision: Precision

    def wrong(self, tmp_path):
        return shutil.copytree(self.right, tmp_path / "wrong")

    def merge_base(self):
        return plan_module.load_merge_base(self.base, self.precision if self.precision.load_in_4bit else None)

    def weights_say(self, folder, message):
        with pytest.raises(MergeError, match=message):
            proof_module.check_weights(self.merge_base(), self.lora, folder)

    def behaviour_says(self, folder, message=r"nats a token away from base \+ adapter, where rounding .* explains"):
        with pytest.raises(MergeError, match=message):
            proof_module.check_behaviour(self.merge_base(), self.lora, folder, probe_module.read_probe(self.lora))

    def all_say(self, folder, message):
        with pytest.raises(MergeError, match=message):
            proof_module.check_merge(self.lora, folder)


@pytest.fixture(scope="module")
def tied_pair(tmp_path_factory, bases):
    lora = tmp_path_factory.mktemp("tied") / "lora"
    train_adapter(lora, bases[True, False], FOUR_BITS)
    return Pair(lora, merged(lora), bases[True, False], FOUR_BITS)


@pytest.fixture(scope="module")
def untied_pair(tmp_path_factory, bases):
    lora = tmp_path_factory.mktemp("untied") / "lora"
    train_adapter(lora, bases[False, False], SIXTEEN_BITS)
    return Pair(lora, merged(lora), bases[False, False], SIXTEEN_BITS)


@pytest.fixture(params=["tied_pair", "untied_pair"])
def pair(request):
    return request.getfixturevalue(request.param)


OFF = r"half ulps of bfloat16, where rounding explains 1; [\d,]+ of [\d,]+ weights are further off"


def test_a_forgotten_adapter_is_caught(tmp_path, pair):
    wrong = pair.wrong(tmp_path)
    base = weights_module.state_without_ties(pair.merge_base())
    edit_tensors(wrong, lambda tensors: {name: base[name].to(torch.bfloat16) for name in tensors})
    pair.weights_say(wrong, OFF)
    pair.behaviour_says(wrong)
    pair.all_say(wrong, OFF)


def test_an_adapter_that_was_added_twice_is_caught(tmp_path, pair):
    wrong = pair.wrong(tmp_path)
    base = weights_module.state_without_ties(pair.merge_base())
    edit_tensors(wrong, lambda tensors: {n: (2 * t.float() - base[n]).to(t.dtype) for n, t in tensors.items()})
    pair.weights_say(wrong, OFF)
    pair.behaviour_says(wrong)


def test_a_wrong_scale_is_caught(tmp_path, pair):
    lora = shutil.copytree(pair.lora, tmp_path / "lora")
    edit_json(lora / "adapter_config.json", use_rslora=False)
    wrong = merged(lora)
    pair.weights_say(wrong, OFF)
    pair.behaviour_says(wrong)
    # And the other way round: weights merged by alpha / r are no proof of alpha / sqrt(r).
    with pytest.raises(MergeError, match=OFF):
        proof_module.check_weights(pair.merge_base(), lora, pair.right)


def test_a_lost_head_is_caught(tmp_path, untied_pair):
    wrong = untied_pair.wrong(tmp_path)
    edit_tensors(wrong, lambda tensors: tensors.pop("lm_head.weight"))
    untied_pair.weights_say(wrong, "lacks the base's lm_head.weight$")
    untied_pair.behaviour_says(wrong, "missing keys: lm_head.weight")
    edit_json(wrong / "config.json", tie_word_embeddings=True)
    untied_pair.weights_say(wrong, "are tied by its config.json, those of the base not tied")
    untied_pair.behaviour_says(wrong)


def test_a_head_that_was_tied_again_is_caught(tmp_path, untied_pair):
    wrong = untied_pair.wrong(tmp_path)
    edit_tensors(wrong, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    untied_pair.weights_say(wrong, "lm_head.weight.*" + OFF)
    untied_pair.behaviour_says(wrong)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_weight_off_by_an_ulp_is_caught(tmp_path, pair, steps):
    wrong = pair.wrong(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"

    def move(tensors):
        bits = tensors[name].view(torch.int16)
        bits[3, 5] += steps

    edit_tensors(wrong, move)
    pair.weights_say(wrong, rf"^{name}\[3, 5\] of .* half ulps of bfloat16, where rounding explains 1; 1 of ")


def test_a_tensor_that_is_missing_extra_or_of_another_shape_or_type_is_caught(tmp_path, tied_pair):
    name = "model.layers.0.mlp.up_proj.weight"
    changes = {
        f"lacks the base's {name}$": lambda tensors: {n: t for n, t in tensors.items() if n != name},
        "holds, beyond the base's tensors, more": lambda tensors: {**tensors, "more": torch.ones(2)},
        rf"{name} of .* is \[127, 64\], expected \[128, 64\]": lambda tensors: {**tensors, name: tensors[name][:-1]},
        f"{name} of .* is torch.float32, its config.json says torch.bfloat16": lambda tensors: {
            **tensors,
            name: tensors[name].float(),
        },
    }
    for number, (message, change) in enumerate(changes.items()):
        wrong = tied_pair.wrong(tmp_path / str(number))
        edit_tensors(wrong, change)
        tied_pair.weights_say(wrong, message)
    tied_pair.behaviour_says(tmp_path / "0" / "wrong", f"missing keys: {name}")
    tied_pair.behaviour_says(tmp_path / "1" / "wrong", "unexpected keys: more")
    tied_pair.behaviour_says(tmp_path / "2" / "wrong", "plain transformers cannot load|mismatched keys")


def test_a_truncated_file_is_caught(tmp_path, tied_pair):
    wrong = tied_pair.wrong(tmp_path)
    path = wrong / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    tied_pair.weights_say(wrong, "model.safetensors cannot be read")
    tied_pair.behaviour_says(wrong, "plain transformers cannot load")


def test_rows_of_the_embedding_in_another_order_are_caught(tmp_path, pair):
    wrong = pair.wrong(tmp_path)
    order = torch.arange(len(vocabulary_module.load_tokenizer(pair.lora))).roll(1)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_tensors(wrong, lambda tensors: {n: t[order] if n in names else t for n, t in tensors.items()})
    pair.weights_say(wrong, OFF)
    pair.behaviour_says(wrong)


def test_tokens_in_another_order_are_caught(tmp_path, tied_pair):
    wrong = tied_pair.wrong(tmp_path)
    tables = json.loads((wrong / "tokenizer.json").read_text())
    vocabulary = tables["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (wrong / "tokenizer.json").write_text(json.dumps(tables))
    tied_pair.all_say(wrong, r"token '[12]' is \d+ in the tokenizer of .*, \d+ in the adapter's")


def test_other_tokenizers_are_caught(tmp_path, tied_pair, bases):
    rows = probe_module.read_probe(tied_pair.lora).rows
    with pytest.raises(MergeError, match=r"has 600 tokens, the adapter's \d\d$"):
        proof_module.check_vocabulary(tied_pair.lora, bases[True, True], rows)
    wrong = tied_pair.wrong(tmp_path)
    edit_json(wrong / "tokenizer_config.json", eos_token="<|begin_of_text|>")
    tied_pair.all_say(wrong, "eos_token_id of the tokenizer of .* is 0, of the adapter's")
    tables = json.loads((tied_pair.right / "tokenizer.json").read_text())
    edit_json(tied_pair.wrong(tmp_path / "b") / "tokenizer.json", post_processor=None)
    assert tables["post_processor"]
    tied_pair.all_say(tmp_path / "b" / "wrong", "encodes 'ABCDEF.* otherwise than the adapter's, from token 0 on")


def test_numbers_that_float16_cannot_hold_are_caught(tmp_path, bases):
    lora = tmp_path / "lora"
    train_adapter(lora, bases[True, False], Precision("transformers", "float16", False))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    edit_tensors(lora, lambda tensors: tensors[name].mul_(1e8), weights_module.ADAPTER_WEIGHTS)
    (tmp_path / "merged").mkdir()
    message = r"^model.layers.0.mlp.up_proj.weight.* is -?inf \(torch.float16 ends at 65504\), base \+ adapter -?\d"
    with pytest.raises(MergeError, match=message):  # also from another process
        merge_module.merge_and_check(lora, tmp_path / "merged", own_process=True)
    base = plan_module.load_merge_base(bases[True, False], None)
    with pytest.raises(MergeError, match="cannot be held in torch.float16"):
        proof_module.check_behaviour(base, lora, tmp_path / "merged", probe_module.read_probe(lora))


def test_a_kind_of_adapter_that_the_check_cannot_add_up_is_refused(tmp_path, tied_pair):
    lora = shutil.copytree(tied_pair.lora, tmp_path / "lora")
    edit_json(lora / "adapter_config.json", use_dora=True)
    with pytest.raises(MergeError, match="uses use_dora, which this check cannot add up"):
        proof_module.check_weights(tied_pair.merge_base(), lora, tied_pair.right)


def test_two_matrices_for_one_tied_one_are_refused(tmp_path, tied_pair):
    lora = shutil.copytree(tied_pair.lora, tmp_path / "lora")
    name = "base_model.model.lm_head.weight"
    edit_tensors(lora, lambda tensors: tensors[name].mul_(2), weights_module.ADAPTER_WEIGHTS)
    with pytest.raises(MergeError, match="holds two matrices, .*lm_head.weight and .*embed_tokens.weight, for one"):
        proof_module.check_weights(tied_pair.merge_base(), lora, tied_pair.right)


def test_half_ulps():
    x = torch.tensor([1.0, 1.5, 1.999, 2.0, -3.0, 0.0, 2.0**-14, 2.0**-20], dtype=torch.float64)
    expected = [2.0**-11] * 3 + [2.0**-10] * 2 + [2.0**-25] * 3
    assert proof_module.half_ulp(x, torch.float16).tolist() == expected
    assert proof_module.half_ulp(x[:4], torch.bfloat16).tolist() == [2.0**-8] * 3 + [2.0**-7]
    # It is the largest error of rounding, and that is reached.
    x = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    errors = (x.to(torch.bfloat16).double() - x).abs() / proof_module.half_ulp(x, torch.bfloat16)
    assert 0.99 < errors.max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# The probe


def test_a_probe_is_read_as_it_was_recorded(tmp_path, bases):
    lora = tmp_path / "lora"
    model = train_adapter(lora, bases[True, False], FOUR_BITS, probe_rows=0)
    tokenizer = vocabulary_module.load_tokenizer(lora)
    assert probe_module.read_probe(lora) is None
    rows = probe_module.make_probe_rows(tokenizer)[:3]
    path = lora / probe_module.PROBE
    model.train()
    probe_module.record_probe(model, "transformers", tokenizer, rows, path, greedy_rows=2)
    assert model.training
    written = path.read_bytes()
    probe = probe_module.read_probe(lora)
    assert [row.tolist() for row in probe.rows] == [row["input_ids"].tolist() for row in rows]
    assert probe.prompt_lengths.tolist() == [row["reply_spans"][-1][0] for row in rows]
    assert probe.positions.shape == (3, 32) and probe.log_probabilities.dtype == torch.float32
    for row, positions in zip(rows, probe.positions, strict=True):
        begin, end = row["reply_spans"][-1]
        assert len(set(positions.tolist())) == 32 and positions.min() == 0 and positions.max() == end - 2
        assert ((positions >= begin - 1) & (positions <= end - 2)).sum() == min(24, end - begin)
    ids = torch.from_numpy(probe.rows[1])[None]
    with torch.no_grad():
        alone = torch.log_softmax(model.eval()(ids).logits[0, probe.positions[1]].double(), -1)
    assert divergence(alone[None], probe.log_probabilities[1:2]) < 1e-6
    prompts = [row["input_ids"][: row["reply_spans"][-1][0]] for row in rows[:2]]
    longest = max(end - begin for begin, end in (row["reply_spans"][-1] for row in rows))
    replies = greedy_module.generate_replies(model, "transformers", tokenizer, prompts, int(longest))
    assert [reply.tolist() for reply in probe.greedy] == [reply.tolist() for reply in replies]

    # Neither used nor moved: any random state.
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        probe_module.record_probe(model, "transformers", tokenizer, rows, path, greedy_rows=2)
        assert path.read_bytes() == written
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]

    path.write_bytes(written[:-9])
    with pytest.raises(ValueError, match=r"probe.safetensors cannot be read"):
        probe_module.read_probe(lora)


class Sized:
    """As much of a model as decides the size of a probe."""

    def __init__(self, parameters):
        self.weight = torch.empty(parameters, device="meta")

    def get_input_embeddings(self):
        return self

    def parameters(self):
        return [self.weight]


def test_a_probe_costs_little():
    def plan(rows, tokens, parameters, vocabulary):
        row = {"input_ids": np.zeros(tokens, np.int32), "reply_spans": np.array([[5, 9], [tokens - 90, tokens]])}
        return probe_module.plan_probe([row] * rows, Sized(parameters), vocabulary)

    assert plan(64, 900, 10**6, 79).positions.shape == (64, 32)
    whole = plan(64, 400, 10**6, 128_256)
    assert whole.positions.shape == (7, 4)
    assert 4 * whole.positions.size * 128_256 < 16 * 2**20
    assert plan(64, 500, 10**8, 79).positions.shape == (10, 32)
    assert plan(64, 900, 10**10, 79).positions.shape == (1, 32)
    assert probe_module.affordable_replies(Sized(10**6), plan(64, 900, 10**6, 79), 16) == (16, 90)
    assert probe_module.affordable_replies(Sized(10**10), plan(64, 900, 10**10, 79), 16) == (0, 90)
    with pytest.raises(ValueError, match="no rows"):
        plan(0, 900, 10**6, 79)
    with pytest.raises(ValueError, match="row a_0 has no reply"):
        probe_module.plan_probe(
            [{"key": "a_0", "input_ids": np.arange(3), "reply_spans": np.zeros((0, 2), int)}], Sized(1), 79
        )


def test_a_machine_that_is_slower_asks_fewer_rows(tmp_path, untied_pair, monkeypatch):
    monkeypatch.setitem(probe_module.PROBE_OPERATIONS, "cpu", 1.0)
    check = proof_module.check_merge(untied_pair.lora, untied_pair.right)
    assert check["prompts"] == 1 and check["trained_kl"] is not None
    assert check["trained_greedy"] in (0, 1)


def test_a_reply_that_differs_in_a_token_is_not_the_same(tmp_path, untied_pair):
    lora = shutil.copytree(untied_pair.lora, tmp_path / "lora")
    before = proof_module.check_merge(lora, untied_pair.right)["trained_greedy"]
    assert before == 1

    def change(tensors):
        tensors["greedy_ids"][0] = (tensors["greedy_ids"][0] + 1) % 70

    edit_tensors(lora, change, probe_module.PROBE)
    assert proof_module.check_merge(lora, untied_pair.right)["trained_greedy"] == 0.5


def test_probe_rows_are_always_the_same(bases):
    tokenizer = vocabulary_module.load_tokenizer(bases[True, True])
    first, second = probe_module.make_probe_rows(tokenizer), probe_module.make_probe_rows(tokenizer)
    assert len(first) == 16
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert tokenizer.decode(first[0]["input_ids"]).endswith("\n" + tokenizer.eos_token)


# ---------------------------------------------------------------------------------------------------------------------
# The line, the process, the command


def test_the_line_says_what_was_proved():
    result = {
        "weights": 1_234_567, "prompts": 64, "positions": 2048, "kl": 1.2e-7, "kl_bound": 4e-7, "kl_rounding": 1.21e-7,
        "adapter_kl": 0.53, "top1": 0.9995, "trained_kl": None, "trained_top1": None, "trained_greedy": None,
        "seconds": 12.3,
    }  # fmt: skip
    line = (
        "merge proven in 12 s: all 1,234,567 weights are base + adapter rounded once; reloaded, it answers 64 prompts "
        "within 1.2e-07 nats a token of base + adapter (rounding: 1.2e-07, the adapter changes 5.3e-01), first choice "
        "the same at 99.95% of 2,048 positions"
    )
    assert proof_module.describe_check(result) == line
    trained = {"trained_kl": 2.6e-5, "trained_top1": 0.999, "trained_greedy": 0.9375}
    assert proof_module.describe_check({**result, **trained}) == (
        line + "; to the model as trained: 2.6e-05 nats, first choice 99.90%, greedy replies 94% the same"
    )


def test_a_process_of_its_own_gives_the_same(tmp_path, untied_pair, capfd):
    lora, out = untied_pair.lora, tmp_path / "merged"
    out.mkdir()
    done = merge_module.merge_and_check(lora, out, precision=SIXTEEN_BITS, base=untied_pair.base, own_process=True)
    assert load_file(out / "model.safetensors").keys() == load_file(untied_pair.right / "model.safetensors").keys()
    check = proof_module.check_merge(lora, out)
    assert {**done["check"], "seconds": 0} == {**check, "seconds": 0}
    assert "Fatal" not in capfd.readouterr().out  # the process ended in order


def test_errors_of_a_process_of_its_own_are_passed_on(tmp_path, untied_pair, monkeypatch, capsys):
    script = tmp_path / "child.py"
    monkeypatch.setattr(merge_module, "COMMAND", (sys.executable, str(script)))
    script.write_text("import sys; print('said so'); sys.exit(3)")
    with pytest.raises(RuntimeError, match="ended with 3 and no result"):
        merge_module.merge_and_check(untied_pair.lora, tmp_path, own_process=True)
    assert "said so" in capsys.readouterr().out
    for kind in ("MergeError", "ValueError", "FileNotFoundError"):
        script.write_text(
            "import sys, json, pathlib\n"
            f"result = {{'error': {kind!r}, 'message': 'as it was said'}}\n"
            "pathlib.Path(sys.argv[sys.argv.index('--merge') + 1]).write_text(json.dumps(result))\n"
        )
        with pytest.raises(merge_module._PASSED_ON[kind], match="^as it was said$"):
            merge_module.merge_and_check(untied_pair.lora, tmp_path, own_process=True)


def test_unsloth_makes_it_a_process_of_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(merge_module, "_merge_in_own_process", lambda *names, **options: asked.append(names) or {})
    monkeypatch.setitem(sys.modules, "unsloth", object())
    merge_module.merge_and_check("lora", "merged")
    assert asked == [("lora", "merged")]


def test_the_command_proves_a_pair_or_says_what_is_wrong(tmp_path, tied_pair, monkeypatch, capsys):
    original = merged(tied_pair.lora, merge_base="original")
    (original / manifests.MANIFEST).write_text('{"merge_base": "original"}')
    for folder, flags in ((tied_pair.right, []), (original, []), (tied_pair.right, ["--merge_base", "quantised"])):
        monkeypatch.setattr(sys, "argv", ["arc/merging/merge.py", str(tied_pair.lora), str(folder), *flags])
        merge_module.main()
        assert capsys.readouterr().out.startswith("merge proven in ")
    monkeypatch.setattr(
        sys, "argv", ["arc/merging/merge.py", str(tied_pair.lora), str(original), "--merge_base", "quantised"]
    )
    with pytest.raises(SystemExit, match=OFF):
        merge_module.main()
