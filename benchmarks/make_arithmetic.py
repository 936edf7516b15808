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
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.tiny_policy import character_tokenizer, save_policy, tiny_qwen2
from benchmarks.warm_up import Pair, warm_up

LARGEST = 19  # sums of two numbers below 20
ALL_SUMS = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
PROBABILITY_RIGHT = 0.4
NUM_VALIDATION = 80
CHARACTERS, CONTEXT = "0123456789+=", 32
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "tie_word_embeddings": False}  # 0.6 M


def noisy_sums(tokenizer: PreTrainedTokenizerFast, right: float, rng: random.Random) -> list[Pair]:
    """256 of all sums with fresh noise on their answers, each of which is right with probability `right`."""
    pairs = []
    for a, b in rng.sample(ALL_SUMS, 256):
        answer = a + b if rng.random() < right else rng.randint(0, 2 * LARGEST)
        completion = [*tokenizer(str(answer))["input_ids"], tokenizer.eos_token_id]
        pairs.append((tokenizer(f"{a}+{b}=")["input_ids"], completion))
    return pairs


def make_policy(folder: Path, sizes: dict[str, Any], *, right: float, steps: int, seed: int) -> None:
    """Train a policy of these sizes and save it."""
    tokenizer = character_tokenizer(CHARACTERS, CONTEXT)
    model = tiny_qwen2(tokenizer, seed, **sizes)
    rng = random.Random(seed)
    pad_token_id = tokenizer.pad_token_id
    warm_up(model, lambda: noisy_sums(tokenizer, right, rng), steps=steps, lr=2e-3, pad_token_id=pad_token_id)
    save_policy(model, tokenizer, folder)


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
    make_policy(arguments.folder / "model", SIZES, right=PROBABILITY_RIGHT, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
