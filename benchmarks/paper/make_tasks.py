"""Makes what the tasks of benchmarks/paper/tasks start from: prompts and a small policy for each.

    python -m benchmarks.paper.make_tasks               # all; writes benchmarks/paper/tasks/<task>/
    python -m benchmarks.paper.make_tasks countdown     # one; each takes under 4 minutes on one core

* countdown: "3 5 8=16:" -> an expression such as "8+5+3"; the policy picks any expression of the numbers, and a right
  one a little more often than chance.
* sums_small: the sums of configs/arithmetic for a policy with a 14th of the parameters.
* chains: "a3b5c2=" -> the running sums modulo 10, "b8c0", each after its term's letter and perhaps the term: "b5=8c0";
  each may go wrong by chance.

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
SHARE_RIGHT = 0.05  # of countdown's completions, beside those that are right by chance

MIN_TERMS, MAX_TERMS = 2, 24
PROBABILITY_WRONG = 0.07  # of a term in a chain
STYLES = (0.1, 0.5, 0.9)  # how often a chain repeats the term in front of its sum


# -- countdown --------------------------------------------------------------------------------------------


def countdown_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Every set of three numbers below 10 with every target that some expression of them has, shuffled."""
    rows = []
    for numbers in itertools.combinations(range(1, 10), 3):
        targets = {value for text in expressions(numbers) if (value := evaluate(text)) is not None}
        rows += [(list(numbers), target) for target in sorted(targets) if 0 <= target <= LARGEST_TARGET]
    rng.shuffle(rows)
    return [countdown_row(rng.sample(numbers, 3), target) for numbers, target in rows]


def countdown_row(numbers: list[int], target: int) -> dict[str, Any]:
    """One prompt with its columns."""
    return {"prompt": f"{' '.join(map(str, numbers))}={target}:", "numbers": numbers, "target": target}


def countdown_texts(progress: float, table: list[Choices], rng: random.Random) -> list[Text]:
    """128 prompts; at first all completions are right, which is how to learn the rule, at last few."""
    share = SHARE_RIGHT if progress > 0.75 else 1.0
    texts = []
    for row, right, all_of_them in rng.sample(table, 128):
        fresh = countdown_row(rng.sample(row["numbers"], 3), row["target"])
        texts.append((fresh["prompt"], rng.choice(right if rng.random() < share else all_of_them)))
    return texts


def make_countdown(folder: Path, seed: int) -> None:
    """0.3 million parameters."""
    rows = countdown_rows(random.Random(seed))
    write_rows(folder / "data", rows)
    table = [(row, right_answers(row), expressions(row["numbers"])) for row in rows]
    tokenizer = character_tokenizer("0123456789+-*=: ", context=32)
    rng = random.Random(seed)
    model = tiny_qwen2(tokenizer, seed, hidden_size=96, intermediate_size=192, num_hidden_layers=4)
    train(model, tokenizer, lambda progress: countdown_texts(progress, table, rng), steps=1600)
    save_policy(model, tokenizer, folder / "model")


# -- chains -----------------------------------------------------------------------------------------------


def chain_row(terms: list[int]) -> dict[str, Any]:
    """One prompt with its columns."""
    prompt = "".join(f"{letter}{term}" for letter, term in zip(string.ascii_lowercase, terms, strict=False))
    return {"prompt": f"{prompt}=", "answer": str(sum(terms) % 10), "num_terms": len(terms)}


def random_terms(num_terms: int, rng: random.Random) -> list[int]:
    """From 1 to 9."""
    return [rng.randint(1, 9) for _ in range(num_terms)]


def chain_rows(rng: random.Random) -> list[dict[str, Any]]:
    """As many different prompts of each length as are needed, lengths in turn."""
    lengths = itertools.cycle(range(MIN_TERMS, MAX_TERMS + 1))
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < NUM_TRAIN + NUM_VALIDATION:
        row = chain_row(random_terms(next(lengths), rng))
        rows[row["prompt"]] = row
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def write_chain(terms: list[int], wrong: float, rng: random.Random) -> str:
    """Running sums in a style drawn for all of them; a term goes wrong with probability `wrong`, and stays so."""
    echoes = rng.choice(STYLES)
    total, parts = terms[0], []
    for letter, term in zip(string.ascii_lowercase[1:], terms[1:], strict=False):
        total = (total + term + (rng.randint(1, 9) if rng.random() < wrong else 0)) % 10
        parts.append(f"{letter}{term}={total}" if rng.random() < echoes else f"{letter}{total}")
    return "".join(parts)


def chain_texts(progress: float, rng: random.Random) -> list[Text]:
    """Prompts of about the same length, so that little is padding; at first short ones, where nothing goes wrong."""
    longest = min(MAX_TERMS, 4 + int(32 * progress))
    wrong = PROBABILITY_WRONG if progress > 0.8 else 0.0
    around = rng.randint(MIN_TERMS, longest)
    texts = []
    for _ in range(1152 // (around + 6)):
        terms = random_terms(min(longest, max(MIN_TERMS, around + rng.randint(-1, 1))), rng)
        texts.append((chain_row(terms)["prompt"], write_chain(terms, wrong, rng)))
    return texts


def make_chains(folder: Path, seed: int) -> None:
    """0.26 million parameters."""
    write_rows(folder / "data", chain_rows(random.Random(seed)))
    tokenizer = character_tokenizer("0123456789=" + string.ascii_lowercase[:MAX_TERMS], context=160)
    rng = random.Random(seed)
    model = tiny_qwen2(tokenizer, seed, hidden_size=96, intermediate_size=192, num_hidden_layers=3)
    train(model, tokenizer, lambda progress: chain_texts(progress, rng), steps=1000)
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
    """0.04 million parameters, trained as configs/arithmetic's were, on the same sums."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "tie_word_embeddings": False}
    make_arithmetic.write_sums(folder / "data", seed)
    make_arithmetic.make_policy(folder / "model", sizes, steps=3000, seed=seed)


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "countdown": make_countdown,
    "sums_small": make_sums_small,
    "chains": make_chains,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*MAKERS, []], default=list(MAKERS), metavar="task")
    parser.add_argument("--folder", type=Path, default=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny tensors, and the same bits on any number of cores
    for task in arguments.tasks:
        print(f"{task}:", flush=True)
        MAKERS[task](arguments.folder / task, arguments.seed)


if __name__ == "__main__":
    main()
