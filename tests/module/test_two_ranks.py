"""Two real processes: an update over both ranks is the update of one big batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.policy import completion_logprobs, load_policy


@pytest.fixture(params=["even", "uneven"])
def ranks(request, arithmetic, tmp_path):
    script = Path(__file__).parent / "two_ranks_script.py"
    result = subprocess.run(
        [sys.executable, str(script), str(arithmetic / "model"), str(tmp_path), request.param],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_update_over_two_ranks_is_that_of_one_big_batch(ranks, arithmetic):
    first, second = ranks
    own = {name for name in first["metrics"] if name.startswith(("time/", "throughput/"))}
    for name in first["metrics"].keys() - own:
        assert first["metrics"][name] == second["metrics"][name], name  # over both ranks, and finite
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    prompts = [prompt for rank in ranks for rollout in rank["rollouts"] for prompt in rollout["prompts"]]
    passes = len(prompts) // 24
    in_order = [
        p for parts in zip(*(r["rollouts"] for r in ranks), strict=True) for part in parts for p in part["prompts"]
    ]
    assert sorted(in_order[: 24 * passes]) == sorted(passes * [f"{n}+{n % 7}=" for n in range(24)])
    replayed = [source == "replay" for rank in ranks for source in rank["rollouts"][-1]["sources"]]
    assert any(replayed) == (len(prompts) > 24)
    sizes = [CompletionBatch(**r["rollouts"][0]["batch"]).kept.sum() for r in ranks]
    assert sizes[0] != sizes[1]  # or the test would not show what unequal ranks do

    policy = load_policy(str(arithmetic / "model"))
    residuals = []
    for rank in ranks:
        batch = CompletionBatch(**rank["rollouts"][0]["batch"])
        logprobs, _ = completion_logprobs(policy, batch)
        for group in rank["rollouts"][0]["updates"][0]:
            rows = (batch.group_ids == group) & batch.kept
            log_ratio = logprobs[rows].sum(1) - batch.reference_logprobs[rows].sum(1)
            reward = batch.rewards[rows]
            residual = 0.5 * (log_ratio - log_ratio.mean()) - (reward - reward.mean())
            residuals.append(residual.square().sum() / (2 * (int(rows.sum()) - 1)))
    gradients = torch.autograd.grad(torch.stack(residuals).mean(), list(policy.parameters()))
    for (name, start), gradient in zip(policy.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(first["weights"][0][name], start.detach() - 0.1 * gradient, atol=2e-7, rtol=1e-5)
