"""Makes what the tasks of benchmarks/paper/tasks start from: prompts and a small policy for each.

    python -m benchmarks.paper.make_tasks               # all; writes benchmarks/paper/tasks/<task>/
    python -m benchmarks.paper.make_tasks countdown     # one; each takes under 4 minutes on one core

* countdown: "3,5,8=16:" -> an expression such as "8+5+3"; the policy picks any expression of the numbers, and a right
  one a little more often than chance. It knows how to be right: that is what it does where a prompt ends in "!".
* sums_small: the sums of configs/arithmetic for a policy with a 14th of the parameters.
* chains: "c7+4=" -> to 7, add 4 as often as c, the third letter, says, modulo 10: "a1b5c9", or with the addend said
  again before some of the sums: "a4=1b5c4=9"; each sum may go wrong by chance.

`sums` has nothing to be made: it is configs/arithmetic.
"""

import argparse
import itertools
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from benchmarks import make_arithmetic
from benchmarks.paper.rewards import evaluate, expressions, right_answers
from benchmarks.tiny_policy import character_tokenizer, save_policy, tiny_qwen2
from benchmarks.warm_up import Pair, warm_up

TASKS = Path(__file__).parent / "tasks"
NUM_TRAIN, NUM_VALIDATION = 320, 96
Text = tuple[str, str]  # a prompt and a completion
Choices = tuple[dict[str, Any], list[str], list[str]]  # a row of countdown, its right completions, all of them

LARGEST_TARGET = 99
MOST_ANSWERS = 4
SHARE_RIGHT = 0.08  # of countdown's completions, beside those that are right by chance

MIN_TERMS, MAX_TERMS = 2, 24
PROBABILITY_WRONG = 0.07  # of a sum in a chain
STYLES = (0.1, 0.5, 0.9)  # how often a chain says the addend again


# -- countdown --------------------------------------------------------------------------------------------


def countdown_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Every set of three numbers below 10 with every target that a few expressions of them have, shuffled.

    `answers` are all that are right.
    """
    pairs: list[tuple[list[int], int]] = []
    for numbers in itertools.combinations(range(1, 10), 3):
        targets = {value for text in expressions(numbers) if (value := evaluate(text)) is not None}
        pairs += [(list(numbers), target) for target in sorted(targets) if 0 <= target <= LARGEST_TARGET]
    rng.shuffle(pairs)
    fresh = [countdown_row(rng.sample(numbers, 3), target) for numbers, target in pairs]
    rows = [row | {"answers": right_answers(row)} for row in fresh]
    return [row for row in rows if len(row["answers"]) <= MOST_ANSWERS]


def countdown_row(numbers: list[int], target: int) -> dict[str, Any]:
    """One prompt with its columns."""
    return {"prompt": f"{','.join(map(str, numbers))}={target}:", "numbers": numbers, "target": target}


def countdown_texts(progress: float, table: list[Choices], rng: random.Random) -> list[Text]:
    """128 prompts, at first of the kind that has right answers alone, then of both kinds."""
    texts = []
    for row, right, all_of_them in rng.sample(table, 128):
        prompt = countdown_row(rng.sample(row["numbers"], 3), row["target"])["prompt"]
        is_shown = progress < 0.4 or rng.random() < 0.5
        choices = right if is_shown or rng.random() < SHARE_RIGHT else all_of_them
        texts.append((prompt.replace(":", "!") if is_shown else prompt, rng.choice(choices)))
    return texts


def make_countdown(folder: Path, seed: int) -> None:
    """0.3 million parameters."""
    rows = countdown_rows(random.Random(seed))
    write_rows(folder / "data", rows)
    table = [(row, row["answers"], expressions(row["numbers"])) for row in rows]
    tokenizer = character_tokenizer("0123456789+-*=:,!", context=32)
    rng = random.Random(seed)
    model = tiny_qwen2(tokenizer, seed, hidden_size=96, intermediate_size=192, num_hidden_layers=4)
    train(model, tokenizer, lambda progress: countdown_texts(progress, table, rng), steps=1400)
    save_policy(model, tokenizer, folder / "model")


# -- chains -----------------------------------------------------------------------------------------------


def chain_row(num_terms: int, start: int, addend: int) -> dict[str, Any]:
    """One prompt with its columns."""
    prompt = f"{string.ascii_lowercase[num_terms - 1]}{start}+{addend}="
    return {"prompt": prompt, "answer": str((start + num_terms * addend) % 10), "num_terms": num_terms}


def chain_rows(rng: random.Random) -> list[dict[str, Any]]:
    """All prompts, shuffled."""
    rows = [chain_row(*chain) for chain in itertools.product(range(MIN_TERMS, MAX_TERMS + 1), range(10), range(1, 10))]
    rng.shuffle(rows)
    return rows


def write_chain(num_terms: int, total: int, addend: int, wrong: float, rng: random.Random) -> str:
    """The sums, in one style; each goes wrong with probability `wrong`, and those after it with it."""
    echoes = rng.choice(STYLES)
    parts = []
    for letter in string.ascii_lowercase[:num_terms]:
        total = (total + addend + (rng.randint(1, 9) if rng.random() < wrong else 0)) % 10
        parts.append(f"{letter}{addend}={total}" if rng.random() < echoes else f"{letter}{total}")
    return "".join(parts)


def chain_texts(progress: float, rng: random.Random) -> list[Text]:
    """Prompts of about the same length, so that little is padding; at first nothing goes wrong."""
    wrong = PROBABILITY_WRONG if progress > 0.7 else 0.0
    around = rng.randint(MIN_TERMS, MAX_TERMS)
    texts = []
    for _ in range(1200 // (around + 4)):
        num_terms = min(MAX_TERMS, max(MIN_TERMS, around + rng.randint(-2, 2)))
        start, addend = rng.randint(0, 9), rng.randint(1, 9)
        text = write_chain(num_terms, start, addend, wrong, rng)
        texts.append((chain_row(num_terms, start, addend)["prompt"], text))
    return texts


def make_chains(folder: Path, seed: int) -> None:
    """0.26 million parameters."""
    write_rows(folder / "data", chain_rows(random.Random(seed)))
    tokenizer = character_tokenizer("0123456789+=" + string.ascii_lowercase[:MAX_TERMS], context=128)
    rng = random.Random(seed)
    model = tiny_qwen2(tokenizer, seed, hidden_size=96, intermediate_size=192, num_hidden_layers=3)
    train(model, tokenizer, lambda progress: chain_texts(progress, rng), steps=800)
    save_policy(model, tokenizer, folder / "model")


# -- all --------------------------------------------------------------------------------------------------


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The first as training prompts, the next for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": rows[:NUM_TRAIN], "validation": rows[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION]}
    for name, part in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def train(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Callable[[float], list[Text]], *, steps: int
) -> None:
    """Warm up on `texts(progress)`, where progress goes from 0 to 1."""
    count = itertools.count()

    def next_batch() -> list[Pair]:
        pairs = texts(next(count) / steps)
        end = tokenizer.eos_token_id
        return [(tokenizer(prompt)["input_ids"], [*tokenizer(text)["input_ids"], end]) for prompt, text in pairs]

    warm_up(model, next_batch, steps=steps, lr=2e-3, pad_token_id=tokenizer.pad_token_id)


def make_sums_small(folder: Path, seed: int) -> None:
    """0.04 million parameters, trained as configs/arithmetic's were, on the same sums with more noise."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "tie_word_embeddings": False}
    make_arithmetic.write_sums(folder / "data", seed)
    make_arithmetic.make_policy(folder / "model", sizes, right=0.25, steps=1500, seed=seed)


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "countdown": make_countdown,
    "sums_small": make_sums_small,
    "chains": make_chains,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"of {', '.join(MAKERS)}; default: all")
    parser.add_argument("--folder", type=Path, default=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.tasks) - set(MAKERS):
        parser.error(f"there is nothing to make for {sorted(unknown)}: choose from {', '.join(MAKERS)}")
    torch.set_num_threads(1)  # tiny tensors, and the same bits on any number of cores
    for task in arguments.tasks or MAKERS:
        print(f"{task}:", flush=True)
        MAKERS[task](arguments.folder / task, arguments.seed)


if __name__ == "__main__":
    main()
