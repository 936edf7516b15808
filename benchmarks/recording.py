"""Results as they come: a JSON file with the machine's name, versions and date, written anew after every row."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


class Recording:
    """Rows under a header that says where and when they were measured; `path` always holds the rows so far."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self.header = {
            "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
            "threads": torch.get_num_threads(),
            "versions": versions(device),
            "date": datetime.date.today().isoformat(),
        }

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write; fill it in later and call `write`."""
        self.rows.append(row)
        self.write()

    def read_rows(self) -> list[dict[str, Any]]:
        """Those that the file holds."""
        rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"]
        return rows

    def write(self) -> None:
        """Replace the file in one step, so that a run that is cut off leaves a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.header | {"rows": self.rows}, indent=1) + "\n")
        os.replace(part, self.path)


def processor() -> str:
    """The CPU's model name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions(device: str) -> dict[str, str]:
    """Of Python, of the packages that are installed, and of CUDA and its driver."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


def obstacle(error: Exception) -> str:
    """Why something could not be measured, in a line."""
    if isinstance(error, ImportError):
        return f"not installed ({error.name or error})"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"cannot run here ({type(error).__name__}: {lines[0][:100]})"


def release_memory() -> None:
    """Give cached device memory back, after a run that did not fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
