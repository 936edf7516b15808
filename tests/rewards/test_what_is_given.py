"""What rewards are given, wherever they run: copies, messages where that is asked for, and seeded random numbers."""

import copy
import json
import random
import shutil

import lightning as L
import numpy
import pytest
from datasets import Dataset

from gvpo_lightning.cli import main
from gvpo_lightning.rewards import BoxedMath, ExactAnswer, Format, LengthPenalty, Rewards, RewardSettings
from gvpo_lightning.rollout.settings import RolloutSettings
from tests.rewards.rewards_for_tests import (
    is_text,
    is_whole,
    rolls,
    sees_messages,
    sees_messages_later,
    spoils,
    spoils_later,
)


@pytest.fixture
def make():
    """Builds `Rewards` whose workers are ended with the test."""
    built = []

    def build(reward, num_workers=0, **settings):
        built.append(Rewards(reward, RewardSettings(num_workers=num_workers, **settings)))
        return built[-1]

    yield build
    for rewards in built:
        rewards.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("spoiler", [spoils, spoils_later])
@pytest.mark.parametrize("texts", [["7", "8"], ["7", "88"]], ids=["at once", "one by one after an exception"])
def test_what_a_reward_changes_in_what_it_is_given_changes_nothing_for_anybody(make, num_workers, spoiler, texts):
    messages = [[{"role": "user", "content": f"{text}+"}] for text in texts]
    prompts = [message for message in messages for _ in range(2)]  # those of a group are one object
    completions, columns = (
        [text for text in texts for _ in range(2)],
        {"answer": [[t] for t in texts for _ in range(2)]},
    )
    before = copy.deepcopy((prompts, completions, columns))
    rewards = make([spoiler, is_whole], num_workers)
    for _ in range(2):
        found, tally = rewards(prompts, completions, columns)
        assert not tally.counts
        assert [rewarded.components["is_whole"] for rewarded in found] == [1.0] * 4
        assert [rewarded.components[spoiler.__name__] for rewarded in found] == [
            11.0 + len(text) for text in completions
        ]
        assert (prompts, completions, columns) == before


def test_a_run_whose_reward_spoils_what_it_is_given_trains_as_one_whose_reward_does_not(make_module, fit, weights):
    rows = [{"prompt": f"{n}+1=", "answer": [str(n)]} for n in range(8)]

    def careless(prompts, completions, answer, **columns):
        found = [len(c) + len(a) for c, a in zip(completions, answer, strict=True)]
        answer[0].append("spoilt")
        prompts.clear()
        completions.clear()
        return found

    def careful(prompts, completions, answer, **columns):
        return [len(c) + len(a) for c, a in zip(completions, answer, strict=True)]

    trained = []
    for reward in (careless, careful):
        own = copy.deepcopy(rows)
        module = make_module(reward=reward, rollout=RolloutSettings(4, prompts_per_rollout=8, prompts_per_update=8))
        fit(module, rows=own, max_steps=2)
        assert own == rows
        assert module.rollout is None or all(isinstance(text, str) for text in module.rollout.completions)
        trained.append(weights(module))
    assert trained[0].equal(trained[1])


TALK, TEXT = [{"role": "user", "content": "3+4="}], "3+4="


@pytest.mark.parametrize("num_workers", [0, 2])
def test_completions_are_messages_by_one_setting_where_prompts_are_and_shipped_rewards_get_text(make, num_workers):
    def sees_text(prompts, completions, **columns):
        return [float(completion == "7") for completion in completions]

    sees_text.takes_text = True
    trl = [sees_messages, sees_messages_later]
    shipped = [ExactAnswer(), Format("7"), LengthPenalty(4, 2), *([BoxedMath(require_box=False)] * (not num_workers))]
    rewards = make([*trl, *shipped, sees_text], num_workers, conversational=True)
    found, tally = rewards([TALK, TALK], ["7", "8"], {"answer": ["7", "7"]}, [[1], [1]])
    assert not tally.counts
    names = list(rewards.functions)
    assert found[0].components == dict.fromkeys(names, 1.0) | {"LengthPenalty": 0.0}
    assert found[1].components == dict.fromkeys(names, 0.0)
    # of prompts that are text completions are text, as in TRL, and without the setting of all
    kind = make([is_text], num_workers, conversational=True)
    assert [r.total for r in kind([TALK, TEXT], ["7", "8"], {})[0]] == [0.0, 1.0]
    assert [r.total for r in make([is_text], num_workers)([TALK, TEXT], ["7", "8"], {})[0]] == [1.0, 1.0]


def test_the_setting_works_from_a_file(arithmetic, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(arithmetic / "model", model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (tmp_path / "run.yaml").write_text(
        f"""
model:
  policy: {model}
  reward:
    - tests.rewards.rewards_for_tests.sees_messages
    - class_path: gvpo_lightning.rewards.ExactAnswer
  reward_settings: {{conversational: true, max_failed_fraction: 0.0}}
  generation: {{max_new_tokens: 4}}
data: {{path: {arithmetic / "sums"}, test_split: "validation[:8]", conversational: true}}
trainer: {{default_root_dir: {tmp_path}, accelerator: cpu, enable_progress_bar: false, logger: false}}
"""
    )
    main(["predict", "--config", str(tmp_path / "run.yaml")])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["prompt"][0]["role"] == "user"
        assert row["reward/ExactAnswer"] == [float(text == row["answer"]) for text in row["completions"]]
        assert row["reward/sees_messages"] == [float(text == "7") for text in row["completions"]]
    assert 1.0 in [value for row in rows for value in row["reward/ExactAnswer"]]


def test_a_failure_on_messages_shows_the_text(make):
    def fails(completions, **columns):
        raise KeyError(completions[0][0]["content"])

    _, tally = make(fails, conversational=True)([TALK], ["7"], {})
    assert "KeyError: '7'" in tally.first["fails"]
    assert "'content': '7'" in tally.first["fails"].splitlines()[-1]


def values_of(rewards, completions, seed):
    return [rewarded.total for rewarded in rewards([TEXT] * len(completions), completions, {}, None, seed)[0]]


def test_random_numbers_in_workers_are_the_runs_whatever_worker_answers(make):
    texts = ["7", "7", "8", "9"] * 3
    first = values_of(make(rolls, 1), texts, 5)
    assert len(set(first)) == len(texts)  # also for the same completion again
    assert values_of(make(rolls, 3), texts, 5) == first
    again = make(rolls, 2)
    assert not set(values_of(again, texts, 6)) & set(first)  # another rollout
    assert values_of(again, ["die", *texts[1:]], 5)[1:] == first[1:]  # a worker has been replaced
    assert values_of(again, texts, 5) == first  # as after a resume


def test_two_rewards_draw_different_numbers_and_in_process_leave_the_runs_own_alone(make):
    def also(prompts, completions, **columns):
        return rolls(prompts, completions)

    random.seed(1)
    numpy.random.seed(1)
    expected = random.random(), numpy.random.random()
    random.seed(1)
    numpy.random.seed(1)
    rewards = make([rolls, also])
    first = rewards([TEXT] * 3, ["7"] * 3, {}, None, 5)[0]
    assert (random.random(), numpy.random.random()) == expected
    values = [value for rewarded in first for value in rewarded.components.values()]
    assert len(set(values)) == 6
    assert rewards([TEXT] * 3, ["7"] * 3, {}, None, 5)[0] == first
    assert rewards([TEXT] * 3, ["7"] * 3, {}, None, 6)[0] != first


class Seen(L.Callback):
    """The rewards of each rollout."""

    def __init__(self):
        self.rewards = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        rollout = pl_module.rollout
        if rollout is not None:
            self.rewards[rollout.index] = rollout.batch.rewards.tolist()


def test_a_run_draws_the_same_again_and_when_it_is_resumed_and_each_rollout_other_numbers(
    make_module, fit, monkeypatch, tmp_path
):
    monkeypatch.setattr("gvpo_lightning.rewards.run.default_num_workers", lambda ranks_here: 2)
    whole, first, rest = Seen(), Seen(), Seen()
    fit(make_module(reward=rolls), callbacks=[whole], max_steps=6)
    trainer = fit(make_module(reward=rolls), callbacks=[first], max_steps=2)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    fit(make_module(reward=rolls), callbacks=[rest], max_steps=6, ckpt_path=tmp_path / "first.ckpt")
    assert set(whole.rewards) == {0, 1, 2}
    assert first.rewards | rest.rewards == whole.rewards
    drawn = [value for values in whole.rewards.values() for value in values]
    assert len(set(drawn)) == len(drawn)


def test_numbers_in_a_dataset_are_what_was_written(make):
    rows = Dataset.from_list([{"answer": 0.5}, {"answer": 72.0}, {"answer": -3.0}])
    found, _ = make([ExactAnswer(), BoxedMath(require_box=False)])(
        [TEXT] * 3, ["0.5", "72", "-3"], {"answer": list(rows["answer"])}
    )
    assert [rewarded.total for rewarded in found] == [2.0] * 3
    found, _ = make(BoxedMath())([TEXT] * 2, [r"\boxed{72}", r"\boxed{0.5}"], {"answer": [[72.0, 0.5]] * 2})
    assert [rewarded.total for rewarded in found] == [1.0] * 2
