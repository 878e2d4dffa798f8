"""Write a tiny base model like Llama 3.2: the demo and the tests train it where the real weights are out of reach.

    python demo/make_base.py --out demo_base

Reads nothing and fetches nothing. Writes OUT/ as transformers would: the configurations, model.safetensors (bfloat16,
random weights), the tokenizer's files; and make_base.json, which records how it was made.

What is like the real one, because the pipeline has to cope with it: one matrix for embedding and head (tied), grouped
query attention, the rope scaling; a byte-level BPE tokenizer with Llama 3's pre-tokenizer, so that digits merge in
groups of up to three; its special tokens; BOS added by the post-processor; <|eot_id|> as the end of a reply; no pad
token.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RECORD_FILE = "make_base.json"
NAMED_TOKENS = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
]  # fmt: skip
# In Llama 3's order, behind the ordinary tokens; the real one goes on to 256 of them.
SPECIAL_TOKENS = [f"<|{name}|>" for name in NAMED_TOKENS] + [f"<|reserved_special_token_{i}|>" for i in range(3, 8)]
BYTES = 256  # each byte is a token, so that every text can be written and every single character is its own token
# Where a text is split before pairs are merged: Llama 3's rule. `\p{N}{1,3}` is what lets up to three digits merge.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "the a of and to in is it that for on with as this by from are be grid puzzle colour row column cell input output "
    "pair rule turn mirror move fall keep count rotate change every other one two three where left right up down line"
).split()


def training_text(seed: int, lines: int = 4000) -> Iterator[str]:
    """Text that the merges are learned from: pairs in the pipeline's own notation, and a few sentences.

    The notation's marks merge as they do in the real vocabulary, so code that looks for them as tokens fails here too.
    """
    rng = np.random.default_rng(seed)

    def rows() -> str:
        height, width = rng.integers(1, 7, size=2)
        colours = rng.choice(10, size=rng.integers(1, 11))
        return "\n".join("".join(map(str, rng.choice(colours, size=width))) for _ in range(height))

    for line in range(lines):
        yield f"I{rows()}\n+/-=O{rows()}\n"
        if line % 8 == 0:  # few words: most of the small vocabulary is for digits
            sentence = " ".join(rng.choice(WORDS, size=rng.integers(3, 12)))
            yield f"{sentence.capitalize()}{rng.choice(list('.!?:;,'))}\n"


def build_tokenizer(vocab: int, seed: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer of `vocab` tokens, the special ones included.

    Raises:
        ValueError: `vocab` is too small for the bytes and the special tokens, or too large for the training text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(
            f"--vocab is {vocab}: the training text gives no more than {tokenizer.get_vocab_size()} tokens"
        )
    bos = SPECIAL_TOKENS[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: "PreTrainedTokenizerFast", hidden: int, layers: int, heads: int, seed: int
) -> "LlamaForCausalLM":
    """A Llama with random weights for the tokenizer, in bfloat16.

    Args:
        tokenizer: gives the size of the vocabulary and the special tokens' ids.
        hidden: width.
        layers: depth.
        heads: query heads; two of them share a key and value head where their number is even.
        seed: of the weights; torch's own generator is left as it was.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    # The chat model's sampling: the pipeline has to put it aside, so the stand-in for it has it too.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, do_sample=True, temperature=0.6, top_p=0.9
    )
    return model


def check_settings(vocab: int, hidden: int, layers: int, heads: int, seed: int) -> None:
    """Refuse a shape that no Llama can have.

    Raises:
        ValueError: with all that is wrong.
    """
    least = BYTES + len(SPECIAL_TOKENS)
    problems = []
    if vocab < least:
        problems.append(
            f"--vocab is {vocab}: expected {least} or more, {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    if min(layers, heads, hidden) < 1:
        problems.append(
            f"--layers, --heads and --hidden are {layers}, {heads} and {hidden}: expected whole numbers from 1"
        )
    elif hidden % (2 * heads):  # rotary embeddings turn pairs of a head's components
        problems.append(f"--hidden is {hidden}: expected a multiple of twice --heads, {2 * heads}")
    if seed < 0:
        problems.append(f"--seed is {seed}: expected a whole number from 0")
    if problems:
        raise ValueError("; ".join(problems))


def is_there(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is a base of just these settings already.

    Raises:
        FileExistsError: it is something else; nothing is overwritten.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: expected a folder; choose another --out")
    if not any(out.iterdir()):
        return False
    record = out / RECORD_FILE
    try:
        made_with = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out} holds files that this program did not write: choose another --out") from None
    if made_with != settings:
        raise FileExistsError(
            f"{out} was made with other settings ({made_with}): move it away, or choose another --out"
        )
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Write the base that the flags describe; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo_base"), help="folder to write (demo_base)")
    parser.add_argument("--hidden", type=int, default=64, help="width (64)")
    parser.add_argument("--layers", type=int, default=2, help="depth (2)")
    parser.add_argument("--heads", type=int, default=4, help="query heads (4)")
    parser.add_argument("--vocab", type=int, default=512, help="tokens, the special ones included (512)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the tokenizer's training text (0)")
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    out = args.out.resolve()
    try:
        check_settings(**settings)
        if is_there(out, settings):
            print(f"{args.out}: there already, made with these settings")
            return 0
        from transformers.utils import logging

        tokenizer = build_tokenizer(args.vocab, args.seed)
        model = build_model(tokenizer, args.hidden, args.layers, args.heads, args.seed)
        # Written beside and renamed, so that an interrupted run leaves no half of a model under the name.
        beside = out.with_name(f"{out.name}.{os.getpid()}.incomplete")
        beside.mkdir(parents=True)
        try:
            logging.disable_progress_bar()  # a bar for a third of a megabyte
            tokenizer.save_pretrained(beside)
            model.save_pretrained(beside)
            record = {"made_by": "demo/make_base.py", "trained_on": "nothing: random weights", "settings": settings}
            (beside / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            beside.replace(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: a Llama of {model.num_parameters():,} random parameters, {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
