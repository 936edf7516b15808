"""What experiments make before their cells: recorded completions and other starts. And what a config says."""

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.paper.cells import QUIET, ROOT

Configs = tuple[str, ...]


def setting(configs: Configs, key: str, default: Any) -> Any:
    """What the last of the config files that has this dotted key says; where none has it, `default`."""
    found = default
    for path in configs:
        value = yaml.safe_load((ROOT / path).read_text())
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        found = found if value is None else value
    return found


def run_apart(tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], jobs: int = 1) -> list[Any]:
    """What functions return, each called in a process of its own kind, so that no model stays in this one."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks]
        return [future.result() for future in futures]


def run_gvpo(command: str, configs: Configs, settings: dict[str, Any], log: Path) -> None:
    """`gvpo COMMAND` in this process; what it prints goes to `log`.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    from gvpo_lightning.cli import main

    told = (QUIET | settings).items()
    arguments = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in told]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            main([command, *(f"--config={ROOT / path}" for path in configs), *arguments])
        except (Exception, SystemExit) as error:
            file.flush()
            raise RuntimeError(f"gvpo {command}: {error}\n{log.read_text()[-2000:]}") from error


def record(configs: Configs, folder: Path, settings: dict[str, Any]) -> Path:
    """A file with completions of the config's policy for its training prompts, as `gvpo predict` writes it."""
    told = {"data.test_split": setting(configs, "data.train_split", "train"), "trainer.default_root_dir": str(folder)}
    run_apart([(run_gvpo, ("predict", configs, told | settings, folder / "predict.log"))])
    return folder / "predictions.jsonl"


def make_start(configs: Configs, folder: Path, noise: float, seed: int) -> None:
    """A folder with the config's policy after noise of `noise` times its own size (RMS) on every weight."""
    from gvpo_lightning.policy.loading import LoadingSettings
    from gvpo_lightning.policy.prepare import load_policy, load_tokenizer

    name, loading = setting(configs, "model.policy", None), LoadingSettings(**setting(configs, "model.loading", {}))
    policy, tokenizer = load_policy(name, loading), load_tokenizer(setting(configs, "model.tokenizer", name), loading)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            size = noise * weight.float().square().mean().sqrt()
            weight.add_((size * torch.randn(weight.shape, generator=generator)).to(weight))
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
