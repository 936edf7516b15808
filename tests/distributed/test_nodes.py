"""The shipped strategy configs by the command itself, on one machine, and as two machines would run them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gvpo_lightning.cli import main
from tests.ports import reserved_port

SHORT = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=4"]
GVPO = [sys.executable, "-m", "gvpo_lightning.cli"]
SIZES = "--trainer.strategy.init_args.data_parallel_size"


def arguments(root: Path, strategy: str, folder: Path, *more: str) -> list[str]:
    configs = ["--config", "configs/arithmetic.yaml", "--config", f"configs/strategy/{strategy}.yaml"]
    assert (root / configs[-1]).exists()
    return ["fit", *configs, *SHORT, f"--trainer.default_root_dir={folder}", *more]


@pytest.fixture
def port():
    """Where the processes of a test meet, whoever launches them: Lightning's launcher takes it from MASTER_PORT."""
    with reserved_port() as port:
        yield port


def run_together(root: Path, folder: Path, port: int, commands: list[tuple[list[str], dict[str, str]]]) -> None:
    """Start all, wait for all, and show what the first to fail has said; one that hangs says where its ranks are."""
    processes, codes = [], []
    settings = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "MASTER_PORT": str(port)}
    for number, (command, own) in enumerate(commands):
        with (folder / f"{number}.log").open("w") as log:
            streams = {"stdout": log, "stderr": log}
            environment = os.environ | settings | own
            processes.append(subprocess.Popen(command, cwd=root, env=environment, start_new_session=True, **streams))
    try:
        for process in processes:
            try:
                codes.append(process.wait(timeout=400))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGABRT)
                codes.append(process.wait())
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has launched
            process.wait()
    for number, code in enumerate(codes):
        assert code == 0, (folder / f"{number}.log").read_text()[-6000:]


def check_run(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 0 < summary["reached_optimum"] < summary["predicted_optimum"]
    policy = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert all(bool(torch.isfinite(p).all()) for p in policy.parameters())
    assert any((folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("ddp", ["--trainer.devices=2"]),
        pytest.param("fsdp2", ["--trainer.devices=2", f"{SIZES}=2"], marks=pytest.mark.slow),
        pytest.param("tp_fsdp2", ["--trainer.devices=4", f"{SIZES}=2"], marks=pytest.mark.slow),
    ],
)
def test_a_strategy_is_one_more_config(root, tmp_path, port, strategy, sizes):
    run_together(root, tmp_path, port, [([*GVPO, *arguments(root, strategy, tmp_path / "run", *sizes)], {})])
    check_run(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "tp_fsdp2"])
def test_every_strategy_config_fits_the_command(root, tmp_path, strategy, monkeypatch, capsys):
    # FSDPStrategy can't be built without a GPU; its settings are checked all the same
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as ended:
        main([*arguments(root, strategy, tmp_path), "--print_config"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert {"ddp": "DDPStrategy", "fsdp1": "FSDPStrategy"}.get(strategy, "ModelParallelStrategy") in shown


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_nodes_of_two_processes(root, tmp_path, port, launcher):
    nodes = ["--trainer.num_nodes=2", "--trainer.devices=2", f"{SIZES}=4"]
    run = arguments(root, "fsdp2", tmp_path / "run", *nodes)
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
        torchrun += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        commands = [([*torchrun, f"--node_rank={node}", "-m", "gvpo_lightning.cli", *run], {}) for node in (0, 1)]
    else:  # what srun sets for each task
        job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "gvpo", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
        job |= {"SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODELIST": "127.0.0.1"}
        job |= {"MASTER_ADDR": "127.0.0.1"}
        tasks = [(str(n), str(n % 2), str(n // 2)) for n in range(4)]
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        commands = [([*GVPO, *run], job | dict(zip(names, task, strict=True))) for task in tasks]
    run_together(root, tmp_path, port, commands)
    check_run(tmp_path / "run")
