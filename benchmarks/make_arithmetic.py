"""Makes what configs/arithmetic.yaml starts from: the sums, the character tokenizer and the reference policy.

    python -m benchmarks.make_arithmetic          # writes configs/arithmetic/, about 5 minutes on 2 cores

The policy is warmed up on NOISY answers: each is right with probability 0.4, else a random number. It so
samples the right answer about 40% of the time, while its greedy answer is nearly always right: what a
pretrained model is to reinforcement learning. The result is shipped, so that everyone starts from the
same bits; running this again makes an equivalent one.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.warm_up import Pair, warm_up

LARGEST = 19  # sums of two numbers below 20
ALL_SUMS = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
PROBABILITY_RIGHT = 0.4
NUM_VALIDATION = 80


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """About 0.6 million parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def noisy_sums(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[Pair]:
    """256 of all sums with fresh noise on their answers."""
    pairs = []
    for a, b in rng.sample(ALL_SUMS, 256):
        answer = a + b if rng.random() < PROBABILITY_RIGHT else rng.randint(0, 2 * LARGEST)
        completion = [*tokenizer(str(answer))["input_ids"], tokenizer.eos_token_id]
        pairs.append((tokenizer(f"{a}+{b}=")["input_ids"], completion))
    return pairs


def write_sums(folder: Path, seed: int) -> None:
    """The 400 sums, shuffled and split, as JSON lines with `prompt` and `answer`."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = list(ALL_SUMS)
    random.Random(seed).shuffle(sums)
    for name, part in (("validation", sums[:NUM_VALIDATION]), ("train", sums[NUM_VALIDATION:])):
        lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("configs/arithmetic"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_sums(arguments.folder / "sums", arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    rng = random.Random(arguments.seed)
    warm_up(
        model,
        lambda: noisy_sums(tokenizer, rng),
        steps=arguments.steps,
        lr=2e-3,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(arguments.folder / "model")
    model.half().save_pretrained(arguments.folder / "model")


if __name__ == "__main__":
    main()
