"""Kills and SIGTERM where Lightning's own launcher has started the second rank."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpointing.survivor import assert_the_same_as
from tests.ports import reserved_port

pytestmark = pytest.mark.slow


@pytest.fixture
def launch(arithmetic, tmp_path):
    """Starts or resumes the run and waits for so many updates; a process and that of its second rank."""
    started, reservations = [], ExitStack()

    def start(updates: int) -> tuple[subprocess.Popen, int | None]:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.checkpointing.survivor", str(run), str(arithmetic / "model"), "ddp"]
        root = Path(__file__).parents[2]
        environment = os.environ | {"MASTER_PORT": str(reservations.enter_context(reserved_port()))}
        with open(run / "output", "w") as output:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        started.append(process)
        record = run / "trained1.jsonl"
        done = len(record.read_text().splitlines()) if record.exists() else 0
        while process.poll() is None and (not record.exists() or len(record.read_text().splitlines()) < done + updates):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = [
            int(pid)
            for pid in (children.read_text().split() if children.exists() else ())
            if b"survivor" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return process, ranks[0] if ranks else None

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    reservations.close()


def is_gone(pid: int, within: float) -> bool:
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        try:
            if b"survivor" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_the_other_rank_never_hangs_and_the_run_goes_on_bitwise(launch, through, tmp_path):
    process, second = launch(2)
    os.kill(second, signal.SIGKILL)
    assert process.wait(200) != 0
    process, second = launch(2)
    process.kill()
    assert is_gone(second, within=200)
    process, second = launch(1)
    os.kill(second, signal.SIGTERM)
    assert process.wait(200) == 143
    assert is_gone(second, within=60)
    process, second = launch(1)
    process.terminate()
    assert process.wait(200) == 143
    assert is_gone(second, within=60)
    process, _ = launch(100)
    assert process.wait(200) == 0
    assert_the_same_as(through("ddp"), tmp_path / "run", ranks=2)
