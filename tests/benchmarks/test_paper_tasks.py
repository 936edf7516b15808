"""The small tasks of benchmarks/paper: their rewards, and the policies that they start from."""

import json

import pytest
import yaml

from benchmarks.paper.rewards import chain_answer, countdown, evaluate, expressions, right_answers

TASKS = ("sums", "sums_small", "countdown", "chains")
BASES = {"sums": (0.35, 0.49), "sums_small": (0.16, 0.3), "countdown": (0.03, 0.12), "chains": (0.32, 0.48)}


@pytest.fixture(scope="module")
def task(root):
    """The settings of a task, with its policy's and its data's folders, and its rows by split."""

    def load(name):
        settings = yaml.safe_load((root / f"benchmarks/paper/tasks/{name}.yaml").read_text())
        folder = root / settings["data"]["path"]
        rows = {
            split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "validation")
        }
        return settings, str(root / settings["model"]["policy"]), rows

    return load


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("8+5+3", 16), ("3-5*8", -37), ("3*5-8", 7), ("2*3*4", 24), ("9-8-7", -6), ("10*2+1-3*4", 9)],
)
def test_expressions_have_their_value(text, value):
    assert evaluate(text) == value


GARBAGE = ["", "+", "3+", "+3", "-3", "3++5", "3 + 5", "3+5=8", "(3+5)", "3/5", "3**5", "03+5", "0", "3.0", "3+5\n"]
GARBAGE += ["３+5", "__import__('os')", "3+x", "3+5<eos>", "1e3", "3_0"]


@pytest.mark.parametrize("text", GARBAGE)
def test_anything_else_has_none(text):
    assert evaluate(text) is None


def test_countdown_wants_each_number_once():
    texts = ["8+5+3", "3+8+5", "8+8", "16", "8+5+3+1", "8*5-3", "85+3", "8+5+3 ", "8+5+30", ""]
    columns = {"numbers": [[3, 5, 8]] * len(texts), "target": [16] * len(texts), "other": [None] * len(texts)}
    assert countdown([""] * len(texts), texts, **columns) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert countdown([""], ["3+3+2"], numbers=[[3, 2, 3]], target=[8]) == [1]  # a number that is given twice


def test_chain_answer_is_the_last_number():
    texts = ["b8c0d7", "7", "b7c", "b8c0d17", "b8c0d7=", "", "d7\n", "d٧"]
    assert chain_answer([""] * len(texts), texts, answer=["7"] * len(texts)) == [1, 1, 0, 0, 0, 0, 0, 0]


def test_right_answers_are_all_that_the_reward_takes(task):
    _, _, rows = task("countdown")
    for row in rows["validation"]:
        right, all_of_them = right_answers(row), expressions(row["numbers"])
        assert len(all_of_them) == 54  # six orders, nine pairs of operators
        rewards = countdown([""] * 54, all_of_them, numbers=[row["numbers"]] * 54, target=[row["target"]] * 54)
        assert {text for text, reward in zip(all_of_them, rewards, strict=True) if reward} == set(right)
        assert row["answers"] == right
        assert all(eval(text) == row["target"] for text in right)  # Python's arithmetic


def test_chains_have_the_right_answer(task):
    _, _, rows = task("chains")
    for row in rows["train"] + rows["validation"]:
        letter, start, _, addend, _ = row["prompt"]
        assert row["num_terms"] == ord(letter) - ord("a") + 1
        assert row["answer"] == str((int(start) + row["num_terms"] * int(addend)) % 10)


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_is_in_both_splits(name, task):
    _, _, rows = task(name)
    train, validation = ({row["prompt"] for row in rows[split]} for split in ("train", "validation"))
    assert len(train) == len(rows["train"]) == 320
    assert len(validation) == len(rows["validation"]) >= 80
    assert not train & validation


@pytest.mark.parametrize("name", TASKS)
def test_policy_starts_where_the_task_says(name, task):
    from gvpo_lightning.policy.prepare import load_policy, load_tokenizer
    from gvpo_lightning.rewards import ExactAnswer, Rewards
    from gvpo_lightning.rollout.groups import sample_rollout
    from gvpo_lightning.rollout.settings import GenerationSettings

    settings, policy, rows = task(name)
    low, high = BASES[name]
    reward = {"countdown": countdown, "chains": chain_answer}.get(name, ExactAnswer())
    sampler = GenerationSettings(**settings["model"]["generation"])
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    assert all(tokenizer.decode(tokenizer(row["prompt"])["input_ids"]) == row["prompt"] for row in rows["train"])
    batch = sample_rollout(model, tokenizer, rows["validation"][:48], 4, sampler, Rewards(reward), seed=0).batch
    assert low < batch.rewards.mean() < high
    assert batch.truncated.float().mean() < 0.02
    if name == "chains":  # within a group as among prompts
        lengths = batch.lengths.view(48, 4).double()
        assert (lengths.amax(1) / lengths.amin(1)).mean() > 1.4
        assert batch.lengths.max() > 60 > 10 > batch.lengths.min()


def test_exact_probability_of_a_right_expression(task):
    import torch

    from gvpo_lightning.callbacks.optimality import answer_probabilities
    from gvpo_lightning.policy.prepare import load_policy, load_tokenizer

    _, policy, rows = task("countdown")
    some = rows["validation"][:12]
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    prompts, texts = zip(*[(row["prompt"], text) for row in some for text in expressions(row["numbers"])], strict=True)
    right = torch.tensor([text in row["answers"] for row in some for text in expressions(row["numbers"])])
    exact = answer_probabilities(model, tokenizer, list(prompts), list(texts), batch_size=512)
    assert exact[right].min() > 1e-4  # the reference has support wherever there is a reward
    assert 0.95 < exact.sum() / 12 <= 1  # it hardly writes anything but expressions of the numbers
    assert 0.03 < exact[right].sum() / 12 < 0.12
