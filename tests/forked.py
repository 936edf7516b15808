"""Processes of a distributed run, forked from one that has imported everything: a start takes a second and not ten."""

import faulthandler
import multiprocessing as mp
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.ports import reserved_port

FORK = mp.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "lightning.pytorch.cli",
        "transformers.models.qwen2",
        "transformers.models.qwen3",
        "peft",
        "gvpo_lightning.callbacks",
    ]
)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what must come, however busy the machine is; AssertionError where it does not."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"nothing for {seconds:g} s"
        time.sleep(0.01)


def enter_rank(folder: str | Path, rank: int, world: int, port: int) -> None:
    """Make this process one rank of a run in `folder`, as Lightning's launcher would; errors go to rank<n>.err."""
    os.chdir(folder)
    os.dup2(os.open(f"rank{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    faulthandler.enable()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if world > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _run(folder: Path, rank: int, world: int, port: int, target: Callable, arguments: tuple) -> None:
    enter_rank(folder, rank, world, port)
    target(*arguments)


def run_ranks(folder: Path, world: int, target: Callable, *arguments, timeout: float = 400.0) -> None:
    """Run a function of an importable module on so many ranks; AssertionError with what it said where one fails."""
    with reserved_port() as port:
        processes = [
            FORK.Process(target=_run, args=(folder, rank, world, port, target, arguments)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    failed = next((rank for rank, code in enumerate(codes) if code != 0), None)
    assert failed is None, f"ranks ended with {codes}:\n{(folder / f'rank{failed}.err').read_text()[-3000:]}"
