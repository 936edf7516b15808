import math

import pytest
import torch

from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.policy.prepare import prepare_policy
from gvpo_lightning.rewards import Rewards
from gvpo_lightning.rewards.protocol import REASONS
from gvpo_lightning.rollout.groups import sample_rollout
from gvpo_lightning.rollout.rollout import Rollout, rollout_metrics
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings

ROWS = [
    {"prompt": "3+4=", "answer": "7", "level": 1},
    {"prompt": "12+7=", "answer": "19", "level": 2},
]


@pytest.fixture
def sample(tiny_policy, tokenizer):
    """Samples the same completions for `ROWS`, asking a reward if given one."""
    policy = tiny_policy()
    prepare_policy(policy)

    def draw(reward=None) -> Rollout:
        settings = GenerationSettings(max_new_tokens=4)
        rewards = None if reward is None else Rewards(reward)
        return sample_rollout(policy, tokenizer, ROWS, 3, settings, rewards, seed=0, index=5)

    return draw


def test_a_rollout_has_each_prompts_completions_side_by_side(sample, tokenizer):
    rollout = sample(lambda prompts, completions, **columns: [0.5] * 6)
    assert rollout.index == 5
    assert rollout.prompts == ["3+4=", "12+7="]
    assert rollout.batch.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(rollout.completions) == 6
    for row, completion in enumerate(rollout.completions):
        ids = rollout.batch.completion_ids[row][rollout.batch.completion_mask[row]]
        assert completion == tokenizer.decode(ids, skip_special_tokens=True)
        prompt = rollout.batch.prompt_ids[row][rollout.batch.prompt_mask[row]]
        assert tokenizer.decode(prompt) == rollout.prompts[row // 3]
    assert not any("<" in completion for completion in rollout.completions)
    assert rollout.sources == ["policy"] * 6
    assert not rollout.batch.source_ids.any()


def test_the_reward_sees_prompts_and_columns_once_a_completion(sample):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [float(i) for i in range(6)]

    rollout = sample(reward)
    assert seen == {
        "prompts": ["3+4="] * 3 + ["12+7="] * 3,
        "completions": rollout.completions,
        "answer": ["7"] * 3 + ["19"] * 3,
        "level": [1] * 3 + [2] * 3,
    }
    assert rollout.batch.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert rollout.batch.kept.all()
    assert rollout.dropped == {"empty": 0, **dict.fromkeys(REASONS, 0), "unrewarded": 0}
    assert rollout.components == {"reward": [0, 1, 2, 3, 4, 5]}


def test_without_a_reward_completions_are_sampled_and_none_counts(sample):
    rollout = sample()
    assert rollout.completions == sample(lambda prompts, completions, **columns: [0.5] * 6).completions
    assert rollout.batch.rewards.isnan().all()
    assert not rollout.batch.kept.any()


def test_completions_without_a_usable_reward_leave_their_group(sample):
    values = [None, math.nan, math.inf, -math.inf, 0.0, -2.5]

    def reward(prompts, completions, **columns):
        return values

    rollout = sample(reward)
    assert rollout.batch.kept.tolist() == [False] * 4 + [True] * 2
    assert rollout.batch.rewards[:4].isnan().all()
    assert rollout.batch.rewards[4:].tolist() == [0.0, -2.5]
    assert rollout.dropped == {"empty": 0, **dict.fromkeys(REASONS, 0), "reward_not_finite": 3, "unrewarded": 1}
    assert rollout.failures.fraction("reward") == 0.5
    metrics = rollout_metrics(rollout.batch, rollout.batch.kept, rollout.batch.lengths)
    assert metrics["reward/mean"] == -1.25
    assert metrics["completion/dropped_fraction"] == pytest.approx(4 / 6)


def test_metrics_are_over_kept_completions():
    batch = collate_completions(
        [[5]] * 4, [[3, 1], [2, 3, 4, 1], [2] * 9, [7]], [False, False, True, True], [0] * 4, pad_token_id=0
    )
    batch.rewards = torch.tensor([1.0, 3.0, math.nan, 2.0])
    batch.drop(torch.tensor([False, False, True, False]))
    assert rollout_metrics(batch, batch.kept, batch.lengths) == pytest.approx(
        {
            "reward/mean": 2.0,
            "reward/std": math.sqrt(2 / 3),
            "completion/length_mean": 7 / 3,
            "completion/length_min": 1.0,
            "completion/length_max": 4.0,
            "completion/truncated_fraction": 0.5,  # of all that were sampled
            "completion/dropped_fraction": 0.25,
        }
    )


def test_metrics_of_a_rollout_without_any_reward_are_nan():
    batch = collate_completions([[5]] * 2, [[3], [2]], [False, True], [0, 0], pad_token_id=0)
    batch.drop(torch.ones(2, dtype=torch.bool))
    metrics = rollout_metrics(batch, batch.kept, batch.lengths)
    assert metrics.pop("completion/dropped_fraction") == 1.0
    assert metrics.pop("completion/truncated_fraction") == 0.5
    assert len(metrics) == 5
    assert all(math.isnan(value) for value in metrics.values())


def test_a_rollout_survives_a_checkpoint(sample, tmp_path):
    rollout = sample(lambda prompts, completions, **columns: [None, *range(5)])
    rollout.prompts[1] = [{"role": "user", "content": "12+7="}]
    rollout.metrics = rollout_metrics(rollout.batch, rollout.batch.kept, rollout.batch.lengths)
    torch.save(rollout.state_dict(), tmp_path / "rollout.pt")
    state = torch.load(tmp_path / "rollout.pt", weights_only=True)
    again = Rollout.from_state_dict(state)
    for name in ("index", "prompts", "completions", "sources", "dropped", "metrics"):
        assert getattr(again, name) == getattr(rollout, name)
    for name, tensor in rollout.batch.state_dict().items():
        torch.testing.assert_close(getattr(again.batch, name), tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, r"rollout\.group_size must be at least 2, got 1"),
        ({"prompts_per_rollout": 0}, r"rollout\.prompts_per_rollout must be at least 1, got 0"),
        ({"prompts_per_update": -1}, r"rollout\.prompts_per_update must be at least 1, got -1"),
        ({"epochs_per_rollout": 0}, r"rollout\.epochs_per_rollout must be at least 1, got 0"),
        ({"micro_batch_size": 0}, r"rollout\.micro_batch_size must be at least 1, got 0"),
        ({"micro_batch_tokens": 0}, r"rollout\.micro_batch_tokens must be at least 1, got 0"),
        ({"max_completion_tokens": 0}, r"rollout\.max_completion_tokens must be at least 1, got 0"),
        ({"truncated": "mask"}, r"rollout\.truncated must be 'keep' or 'drop', got 'mask'"),
        ({"zero_variance": "mask"}, r"rollout\.zero_variance must be 'keep' or 'drop', got 'mask'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**settings)
