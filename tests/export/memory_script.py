"""Exports FOLDER/large and prints by how many bytes that raised this process's largest resident memory."""

import resource
import sys
from pathlib import Path

from exporting import export  # run by its path

from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rewards import ExactAnswer


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: Path, max_shard_size: str) -> None:
    small, large = (GVPOModule(str(folder / name), ExactAnswer()) for name in ("small", "large"))
    export(small, folder / "small" / "ckpt", folder / "first")  # what is imported and allocated only once
    before = peak()
    export(large, folder / "large" / "ckpt", folder / "second", max_shard_size=max_shard_size)
    print("raised by", peak() - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
