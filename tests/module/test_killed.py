"""A run with replay, demonstrations and a moving reference that is killed and started again ends bitwise the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(arithmetic, folder, kill_in="never", kill_at=0) -> int:
    folder.mkdir(exist_ok=True)
    result = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "killed_script.py"),
            str(arithmetic / "model"),
            str(folder),
            kill_in,
            str(kill_at),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode in (0, -9), result.stderr[-3000:]
    return result.returncode


@pytest.fixture(scope="module")
def through(arithmetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("through")
    assert run(arithmetic, folder) == 0
    return torch.load(folder / "weights.pt")


# rollouts of 2 updates of 3 micro-batches; the second pass over the prompts begins within the second rollout
@pytest.mark.parametrize(
    ("kill_in", "kill_at"),
    [
        ("training", 24),
        pytest.param("training", 14, marks=pytest.mark.slow),
        pytest.param("reward", 4, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bitwise(arithmetic, tmp_path, through, kill_in, kill_at):
    assert run(arithmetic, tmp_path / "run", kill_in, kill_at) == -9
    assert not (tmp_path / "run" / "weights.pt").exists()
    assert run(arithmetic, tmp_path / "run") == 0
    resumed = torch.load(tmp_path / "run" / "weights.pt")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, through, strict=True))
