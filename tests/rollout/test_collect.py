"""Ranks share a rollout's work completion by completion, and have the same rollout afterwards."""

from collections import Counter
from itertools import chain

import lightning as L
import pytest
import torch

from gvpo_lightning.data.batch import Completion
from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rewards.protocol import RAISED, RewardError
from gvpo_lightning.rewards.run import FailureTally
from gvpo_lightning.rollout.collect import hashed

ROWS = [{"prompt": f"{n}+1=", "number": n} for n in range(3)]


class OneOfSeveral(DataRanks):
    """Ranks of which this process is one; `others` has what the others hand over, by rank."""

    others: dict

    def gather(self, value):
        return [value if rank == self.rank else self.others[rank] for rank in range(self.size)]


@pytest.fixture
def as_rank(make_module):
    """The module as it is on one of several ranks."""

    def build(rank, size, others=None, **settings) -> GVPOModule:
        ranks = OneOfSeveral(rank, size)
        object.__setattr__(ranks, "others", others)
        module = make_module(**settings)
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        module.trainer.strategy.connect(module)
        module.setup("fit")
        module.configure_model()
        module.placement.ranks = ranks
        return module

    return build


def completion(text, source="policy"):
    return Completion(torch.tensor([3, 1]), text, source, truncated=False)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_fresh", [[2, 2, 2], [3, 0, 1], [1, 0, 0], [0, 0, 0]])
def test_the_shares_of_the_ranks_are_the_whole_and_as_equal_as_can_be(as_rank, num_fresh, size):
    modules = [as_rank(rank, size) for rank in range(size)]
    shares = [m.collector.sample_share(m.policy, [[5], [6, 7], [8]], num_fresh, index=0) for m in modules]
    counts = torch.tensor([[len(group) for group in share] for share in shares])
    assert counts.sum(dim=0).tolist() == num_fresh
    assert int(counts.sum(dim=1).max() - counts.sum(dim=1).min()) <= 1


def test_ranks_sample_different_completions(as_rank):
    modules = [as_rank(rank, 2) for rank in (0, 1)]
    first, second = (m.collector.sample_share(m.policy, [[5]], [16], index=0) for m in modules)
    texts = [[c.text for c in share[0]] for share in (first, second)]
    assert len(texts[0]) == len(texts[1]) == 8
    assert texts[0] != texts[1]


def test_every_completion_is_rewarded_once_and_all_ranks_have_all_in_one_order(as_rank):
    asked = []

    def reward(prompts, completions, number, **columns):
        asked.append(list(zip(prompts, completions, number, strict=True)))
        return [float(text) for text in completions]

    def work(rank, others=None):
        """What a rank does: it has sampled its completions, and knows all that are recorded."""
        fresh = [[completion(f"1{rank}")], [completion(f"2{rank}")], []]
        recorded = [[completion("13", "replay")], [], [completion("31", "replay"), completion("32", "replay")]]
        return as_rank(rank, 2, others, reward=reward).collector.reward_shares(ROWS, fresh, recorded)[0]

    # what each hands over is seen where it is asked for the other's
    handed = {}
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OneOfSeveral, "gather", lambda ranks, value: [handed.setdefault(ranks.rank, value)])
            work(rank)
    questions = list(chain(*asked))
    assert sorted(text for _, text, _ in questions) == ["10", "11", "13", "20", "21", "31", "32"]
    assert all(prompt == ROWS[number]["prompt"] for prompt, _, number in questions)
    assert {int(text[0]) - 1 == number for _, text, number in questions} == {True}
    groups = [work(rank, handed) for rank in (0, 1)]
    texts = [[[c.text for c in group] for group in mine] for mine in groups]
    assert texts[0] == texts[1] == [["10", "11", "13"], ["20", "21"], ["31", "32"]]
    assert all(c.reward == float(c.text) for c in chain(*chain(*groups)))


def test_a_reward_that_fails_on_one_rank_stops_all(as_rank):
    def reward(prompts, completions, **columns):
        raise ConnectionError("no server")

    nothing, of_rows = [[], [], []], hashed(ROWS)
    others = {1: (nothing, nothing, of_rows, None, FailureTally(asked=1))}
    with pytest.raises(RewardError, match=r"(?s)failed on 50.0% of 2 completions.*ConnectionError: no server.*'1'"):
        as_rank(0, 2, others, reward=reward).collector.reward_shares(ROWS, [[completion("1")], [], []], nothing)
    first = {"reward": "ConnectionError: no server"}
    others = {1: (nothing, nothing, of_rows, None, FailureTally(1, Counter({("reward", RAISED): 1}), first))}
    with pytest.raises(RewardError, match=r"(?s)failed on 50.0% of 2 completions.*ConnectionError: no server"):
        as_rank(0, 2, others).collector.reward_shares(ROWS, [[completion("1")], [], []], nothing)


def test_a_reward_with_a_wrong_answer_on_one_rank_stops_all(as_rank):
    nothing, of_rows = [[], [], []], hashed(ROWS)
    fresh = [[completion("1")], [], []]
    others = {1: (nothing, nothing, of_rows, None, FailureTally())}
    two = as_rank(0, 2, others, reward=lambda prompts, completions, **_: [1, 2])
    with pytest.raises(RewardError, match="one entry a completion, 1, got 2"):
        two.collector.reward_shares(ROWS, fresh, nothing)
    others = {1: (nothing, nothing, of_rows, "got 2", FailureTally())}
    with pytest.raises(RewardError, match="The reward failed on rank 1: got 2"):
        as_rank(0, 2, others).collector.reward_shares(ROWS, fresh, nothing)


def test_ranks_with_other_prompts_are_told_so(as_rank):
    nothing = [[], [], []]
    other = {1: (nothing, nothing, hashed(ROWS[::-1]), None, FailureTally())}
    with pytest.raises(ValueError, match="Rank 1 was given other prompts than rank 0"):
        as_rank(0, 2, other).collector.reward_shares(ROWS, nothing, nothing)
