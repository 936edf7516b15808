"""Who sampled does not change where a run ends: the benchmark's five regimes, and its smallest run."""

import json

import pytest
import torch

from benchmarks import sampling
from benchmarks.sampling_baseline import VARIANTS, grpo_loss
from gvpo_lightning.objectives.baselines import group_advantages

FIELDS = {"objective", "regime", "seed", "predicted", "reached", "difference", "seconds", "trace"}


@pytest.mark.slow
@pytest.mark.parametrize("regime", sampling.REGIMES)
def test_every_regime_ends_at_the_prediction(regime, tmp_path):
    settings = sampling.Settings()
    sampling.prepare(tmp_path, settings, seed=1)
    row = sampling.train_gvpo(regime, tmp_path, settings, seed=1)
    assert row["predicted"] == pytest.approx(0.661, abs=0.001)
    assert row["trace"][0][1] < 0.45  # where the reference is
    assert row["reached"] == pytest.approx(row["predicted"], abs=sampling.TOLERANCE)


def test_command_leaves_a_row_a_run_and_a_plot(tmp_path):
    output = tmp_path / "sampling.json"
    sampling.main(["--updates", "2", "--completions", "4", "--output", str(output)])
    record = json.loads(output.read_text())
    assert record.keys() >= {"settings", "files", "versions", "tolerance"}
    assert [file["file"] for file in record["files"]] == list(sampling.SAMPLERS)
    assert [file["right"] for file in record["files"]] == pytest.approx([0.42, 0.11, 0.05], abs=0.04)
    assert all(row.keys() >= FIELDS for row in record["rows"])
    ours = [row for row in record["rows"] if row["objective"] == "GVPO"]
    assert [row["regime"] for row in ours] == [*sampling.REGIMES, "hot file"]
    assert all(row.keys() >= set(sampling.METRICS) for row in ours)
    assert {row["objective"] for row in record["rows"]} == {"GVPO", *VARIANTS}
    assert all([update for update, _ in row["trace"]] == [0, 2] for row in record["rows"])
    assert len({row["trace"][0][1] for row in record["rows"]}) == 1  # all start from the same policy
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_baseline_is_grpo():
    from gvpo_lightning.data.batch import collate_completions

    batch = collate_completions([[3]] * 4, [[4, 1], [5, 1], [6, 1], [7, 8]], [False] * 4, [0, 0, 1, 1], 0)
    batch.rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    advantages = group_advantages(batch.rewards, batch.group_ids, batch.kept, divide_by_std=True)
    assert advantages.tolist() == pytest.approx([0.5 / 0.7072, -0.5 / 0.7072, 0.0, 0.0], abs=1e-3)
    sampler = torch.full((4, 2), -1.0)
    batch.reference_logprobs = sampler.clone()
    policy = (sampler + torch.tensor([0.1, 1.0])).requires_grad_()  # within the clip, beyond it
    grpo_loss(policy, sampler, batch, beta=0.0, divide=False).backward()
    expected = torch.zeros(4, 2)
    expected[0, 0], expected[1] = 0.5 * 1.10517, -0.5 * torch.tensor([1.10517, 2.71828])
    torch.testing.assert_close(policy.grad, -expected / 8, atol=1e-5, rtol=1e-4)
