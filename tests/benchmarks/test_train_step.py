"""Whole steps at their smallest, and what the step benchmark needs of the machine."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import train_step
from benchmarks.report import step_table
from benchmarks.train_step_paths import SIZES, build_model, make_batch, paths

FIELDS = {"provider", "implementation", "model", "batch", "tokens_per_second", "peak_bytes", "largest", "loss"}


@pytest.mark.parametrize("model", ["tiny", "tiny-lora"])
def test_ours_and_eager_take_the_same_step(model):
    gradients, losses = [], []
    for path in paths():
        if path.objective == "GVPO":
            policy = build_model(SIZES[model], path.install, torch.float32, "cpu")
            loss = path.loss(policy, make_batch(8, (8, 24), SIZES[model].vocabulary, "cpu"))
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for ours, eager in zip(*gradients, strict=True):
        assert (ours - eager).norm() <= 1e-3 * eager.norm() + 1e-6


def test_command_leaves_rows_without_the_training_packages(root, tmp_path):
    output = tmp_path / "steps.json"
    script = "import sys; sys.modules.update(dict.fromkeys(['datasets', 'jsonargparse', 'lightning'])); "
    script += "from benchmarks.train_step import main; main()"
    settings = ["--models", "tiny", "--batch", "2", "--shortest", "8", "--longest", "16", "--steps", "1"]
    command = [sys.executable, "-c", script, *settings, "--output", str(output)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert all(row.keys() >= FIELDS for row in rows)
    timed = {row["provider"] for row in rows if row["tokens_per_second"]}
    assert {"ours", "eager"} <= timed
    assert all(row["note"] for row in rows if not row["tokens_per_second"])
    assert len(step_table(rows).splitlines()) == len(rows) + 2


@pytest.mark.parametrize("most", [0, 1, 5, 16, 23, 200])
def test_largest_batch_is_within_an_eighth(most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    found = train_step.largest_batch(fits, limit=64)
    assert found <= min(most, 64)
    assert min(most, 64) - found <= max(1, found // 8) * (found > 0)
    assert len(tried) <= 12


def test_lengths_are_ragged_and_the_batch_the_same_for_every_path():
    first, second = (make_batch(8, (8, 64), 100, "cpu") for _ in range(2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert (int(first.lengths.min()), int(first.lengths.max())) == (8, 64)
