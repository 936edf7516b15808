import pytest
import torch

from gvpo_lightning.data.batch import Completion
from gvpo_lightning.sources.replay import ReplayBuffer
from gvpo_lightning.sources.settings import ReplaySettings


def completion(number: int) -> Completion:
    return Completion(
        token_ids=torch.arange(number + 1),
        text=str(number),
        source="policy",
        truncated=number % 2 == 0,
        reward=number / 3,
        reference_logprobs=-torch.rand(number + 1, generator=torch.Generator().manual_seed(number)),
        reference_version=number,
    )


def filled(**settings) -> ReplayBuffer:
    """Three prompts' groups of two, `a` seen twice: a(0, 1), b(2, 3), a(4, 5), c(6, 7)."""
    buffer = ReplayBuffer(ReplaySettings(2, **settings))
    buffer.add(((key, [completion(2 * n), completion(2 * n + 1)]) for n, key in enumerate("abac")), 0)
    return buffer


def texts(completions) -> list[str]:
    return [c.text for c in completions]


def test_recent_takes_the_newest_groups_first():
    buffer = filled(selection="recent")
    assert texts(buffer.draw("a", 3, seed=0)) == ["4", "5", "0"]
    assert texts(buffer.draw("b", 3, seed=0)) == ["2", "3"]
    assert buffer.draw("unknown", 3, seed=0) == []


def test_uniform_draws_every_remembered_completion_equally_often_and_none_twice():
    buffer = filled()
    counts = dict.fromkeys("0145", 0)
    for seed in range(2000):
        drawn = texts(buffer.draw("a", 2, seed))
        assert len(set(drawn)) == 2
        for text in drawn:
            counts[text] += 1
    assert all(900 < count < 1100 for count in counts.values())
    assert texts(buffer.draw("a", 2, 7)) == texts(buffer.draw("a", 2, 7))


@pytest.mark.parametrize(("capacity", "left"), [(4, "0123 4567"), (3, "23 4567"), (2, "4567"), (1, "67")])
def test_the_oldest_groups_are_forgotten_first(capacity, left):
    buffer = filled(capacity=capacity)
    assert len(buffer) == min(capacity, 4)
    found = {text for key in "abc" for text in texts(buffer.draw(key, 10, seed=0))}
    assert found == set(left) - {" "}


@pytest.mark.parametrize("capacity", [10, 2])
def test_a_checkpoint_loses_nothing(tmp_path, capacity):
    buffer = filled(capacity=capacity)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    again = ReplayBuffer(buffer.settings)
    again.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    buffer.add([("b", [completion(8)])], 1)
    again.add([("b", [completion(8)])], 1)
    for key in "abc":
        for mine, theirs in zip(buffer.draw(key, 10, 3), again.draw(key, 10, 3), strict=True):
            assert torch.equal(mine.token_ids, theirs.token_ids)
            assert torch.equal(mine.reference_logprobs, theirs.reference_logprobs)
            for name in ("text", "truncated", "reward", "reference_version"):
                assert getattr(mine, name) == getattr(theirs, name)


def test_an_empty_buffer_survives_a_checkpoint(tmp_path):
    torch.save(ReplayBuffer(ReplaySettings(1)).state_dict(), tmp_path / "buffer.pt")
    again = filled()
    again.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert len(again) == 0
