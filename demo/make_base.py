"""Write a tiny base model like Llama 3.2: the demo and the tests train it where the real weights are out of reach.

    python demo/make_base.py --out demo_base
    python demo/make_base.py --out demo/base --size demo --pretrain_steps 8000 --measure 100

Reads nothing and downloads nothing. Writes a model folder OUT/: the configurations, model.safetensors (bfloat16; random
weights unless --pretrain_steps is given), the tokenizer's files, and make_base.json, which records the settings.
Pretraining draws endless puzzles, each with a new rule (arc/generation). It leaves some families of rules out, so that
a fine-tuning has something to teach. It takes minutes on CUDA; on a CPU it is for tests.

It is like the real model where the pipeline has to cope with it: one matrix for embedding and head (tied); grouped
query attention; the rope scaling; a byte-level BPE tokenizer with Llama 3's pre-tokenizer, so that digits merge in
groups of up to three; its special tokens; a post-processor that adds BOS; <|eot_id|> as the end of a reply; no pad
token.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arc.generation.families import FAMILIES
from arc.generation.pretraining import NEW_FAMILIES, Pretraining

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RECORD_FILE = "make_base.json"
# Width, depth, query heads, width between the two halves of a layer's feed-forward part. Parameters with 512 tokens:
SHAPES = {
    "tiny": (64, 2, 4, 256),  # 0.2 million; for tests
    "demo": (192, 9, 6, 512),  # 3.8 million, 7.5 MB
    "small": (384, 12, 6, 1536),  # 26.6 million
}
NAMED_TOKENS = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
]  # fmt: skip
# In Llama 3's order, behind the ordinary tokens; the real one goes on to 256 of them.
SPECIAL_TOKENS = [f"<|{name}|>" for name in NAMED_TOKENS] + [f"<|reserved_special_token_{i}|>" for i in range(3, 8)]
ROPE_THETA = 500000.0  # Llama 3's, for contexts of 128k tokens
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
    """Text for learning the merges: pairs in the pipeline's text format, and a few sentences.

    The format's marks merge as they do in the real vocabulary, so code that looks for them as tokens fails here too.
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
        ValueError: `vocab` is too small for bytes and special tokens, or too large for the training text.
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
    tokenizer: "PreTrainedTokenizerFast",
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    seed: int,
    rope_theta: float = ROPE_THETA,
    spread: float = 0.02,
) -> "LlamaForCausalLM":
    """A Llama with random weights for the tokenizer, in bfloat16.

    Args:
        tokenizer: decides the size of the vocabulary and the special tokens' ids.
        hidden: width.
        layers: depth.
        heads: query heads; if their number is even, two share a key and value head.
        intermediate: width inside the feed-forward part.
        seed: of the weights; torch's own generator is left as it was.
        rope_theta: base of the rotary embeddings, whose wavelengths are 2 pi to 2 pi * rope_theta tokens.
        spread: standard deviation of the weights.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        initializer_range=spread,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": rope_theta,
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
    # The chat model's sampling settings: the pipeline has to ignore them, so this model has them too.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, do_sample=True, temperature=0.6, top_p=0.9
    )
    return model


def check_settings(
    vocab: int, hidden: int, layers: int, heads: int, intermediate: int, seed: int, rope_theta: float,
    pretraining: Pretraining,
) -> None:  # fmt: skip
    """Check the shape of the model and the settings of the pretraining.

    Raises:
        ValueError: lists all problems.
    """
    least = BYTES + len(SPECIAL_TOKENS)
    problems = []
    if vocab < least:
        problems.append(
            f"--vocab is {vocab}: expected {least} or more, {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    if min(layers, heads, hidden, intermediate) < 1:
        problems.append(
            f"--layers, --heads, --hidden and --intermediate are {layers}, {heads}, {hidden} and {intermediate}: "
            "expected whole numbers from 1"
        )
    elif hidden % (2 * heads):  # rotary embeddings turn pairs of a head's components
        problems.append(f"--hidden is {hidden}: expected a multiple of twice --heads, {2 * heads}")
    if not 1 < rope_theta < float("inf"):
        problems.append(f"--rope_theta is {rope_theta:g}: expected a number above 1")
    if seed < 0:
        problems.append(f"--seed is {seed}: expected a whole number from 0")
    problems += pretraining.problems()
    if problems:
        raise ValueError("; ".join(problems))


def is_there(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is already a base with these settings.

    Raises:
        FileExistsError: it is something else, which is not overwritten.
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
    before = {"rope_theta": ROPE_THETA}  # values of settings that older records lack
    if made_with.get("pretrain_steps"):
        before |= {"pretrain_programs": 0.0}
    if {**before, **made_with} != settings:
        raise FileExistsError(
            f"{out} was made with other settings ({made_with}): move it away, or choose another --out"
        )
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Write the base that the flags describe; return the exit code."""
    args = parse_flags(argv)
    hidden, layers, heads, intermediate = SHAPES[args.size]
    if args.hidden is not None and args.intermediate is None:
        intermediate = 4 * args.hidden
    given = {"hidden": args.hidden, "layers": args.layers, "heads": args.heads, "intermediate": args.intermediate}
    shape = {"hidden": hidden, "layers": layers, "heads": heads, "intermediate": intermediate}
    shape |= {name: value for name, value in given.items() if value is not None}
    pretraining = Pretraining(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(args).items()
            if name == "seed" or (name.startswith("pretrain_") and name != "pretrain_workers")
        }
    )
    settings = {"vocab": args.vocab, **shape, "seed": args.seed, "rope_theta": args.rope_theta}
    out = args.out.resolve()
    try:
        check_settings(**settings, pretraining=pretraining)
        if pretraining.pretrain_steps:  # as JSON gives it back
            settings |= json.loads(json.dumps(asdict(pretraining)))
        if is_there(out, settings):
            print(f"{args.out}: there already, made with these settings")
            return 0
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for a few megabytes
        tokenizer = build_tokenizer(args.vocab, args.seed)
        # Llama's own 0.02 is for widths of thousands. With it a model of width 64 had not learned to copy cells after
        # 4,000 steps (loss 1.6); with this one it began to after 400.
        spread = shape["hidden"] ** -0.5 if pretraining.pretrain_steps else 0.02
        model = build_model(tokenizer, **shape, seed=args.seed, rope_theta=args.rope_theta, spread=spread)
        record: dict[str, Any] = {"made_by": "demo/make_base.py"}
        if pretraining.pretrain_steps:
            from arc.generation.pretraining import pretrain, print_measured, solved_by_family

            watch = {"workers": args.pretrain_workers, "measure": args.measure, "measure_steps": args.measure_steps}
            done = pretrain(model, tokenizer, pretraining, **watch)
            record |= {"trained_on": "generated puzzles, see arc/generation/pretraining.py", "pretraining": done}
        else:
            record["trained_on"] = "nothing: random weights"
        record["settings"] = settings
        model.bfloat16()
        if args.measure and pretraining.pretrain_steps:
            model.float()  # the rounded weights, in arithmetic that every machine is quick at
            solved = solved_by_family(model, tokenizer, pretraining, args.measure)
            model.bfloat16()
            print_measured(solved, pretraining)
            record["solved_of_fresh_puzzles"] = {"puzzles_of_each_family": args.measure, **solved}
        # Write beside and rename: an interrupted run leaves no incomplete model under the name.
        beside = out.with_name(f"{out.name}.{os.getpid()}.incomplete")
        beside.mkdir(parents=True)
        try:
            tokenizer.save_pretrained(beside)
            model.cpu().save_pretrained(beside)
            (beside / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            beside.replace(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    weights = "pretrained" if pretraining.pretrain_steps else "random"
    print(f"{args.out}: a Llama of {model.num_parameters():,} {weights} parameters, {len(tokenizer)} tokens")
    return 0


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags. Those of the pretraining have the names of `Pretraining`'s fields."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo_base"), help="folder to write (demo_base)")
    parser.add_argument("--size", choices=SHAPES, default="tiny", help="shape; the next four flags change it (tiny)")
    parser.add_argument("--hidden", type=int, help="width (64)")
    parser.add_argument("--layers", type=int, help="depth (2)")
    parser.add_argument("--heads", type=int, help="query heads (4)")
    parser.add_argument("--intermediate", type=int, help="width inside the feed-forward part (4 times --hidden)")
    parser.add_argument(
        "--rope_theta", type=float, default=ROPE_THETA,
        help="base of the rotary embeddings' wavelengths (500000, Llama 3's)",
    )  # fmt: skip
    parser.add_argument("--vocab", type=int, default=512, help="tokens, the special ones included (512)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokenizer's text and puzzles (0)")
    default = Pretraining()

    def add(name: str, text: str) -> None:
        value = getattr(default, f"pretrain_{name}")
        if isinstance(value, bool):
            options: dict[str, Any] = {"action": "store_true"}
        elif isinstance(value, tuple):
            options = {"nargs": "+", "type": type(value[0]), "metavar": "X"}
        else:
            options = {"type": type(value), "metavar": "X"}
        parser.add_argument(f"--pretrain_{name}", default=value, help=text, **options)

    add("steps", "steps of a pretraining; 0: random weights (0)")
    add("seconds", "stop after this many seconds, compiling excluded; the rate reaches 0 by then; 0: no limit (0)")
    add("families", f"families of rules (all but {', '.join(NEW_FAMILIES)}; there are {', '.join(FAMILIES)})")
    add("programs", "share of the puzzles whose rule is a random program instead, see arc/generation/programs.py (0)")
    add("sizes", "demonstrations of a puzzle, drawn from these (3)")
    add("max_side", "largest side of a grid (5)")
    add("batch", "tokens of a step, padding included (32768)")
    add("rate", "highest learning rate of AdamW (0.002)")
    add("input_weight", "weight in the loss of tokens outside replies; 0: replies only, 1: all tokens equally (0.1)")
    add("compile", "compile the layers: a minute that pays in long runs on CUDA")
    parser.add_argument("--pretrain_avoid", metavar="DIR", help="a dataset whose puzzles must not be trained on")
    parser.add_argument("--pretrain_workers", type=int, default=0, help="processes that draw puzzles; 4 feed a GPU (0)")
    parser.add_argument("--measure", type=int, default=0, help="puzzles of each family to solve at the end (0)")
    parser.add_argument("--measure_steps", type=int, default=0, help="also measure each time after this many (0: no)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
