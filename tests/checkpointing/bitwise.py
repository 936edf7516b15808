"""Whether the runs of `earlier/` go on bit for bit as they did on the machine that wrote their checkpoints.

For that machine, or one with the same CPU and libraries: elsewhere rounding differs, and test_earlier_runs has bounds.

    python -m tests.checkpointing.bitwise

It prints one line for each run, and ends with 1 if one of them differs.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.checkpointing.earlier_runs import EARLIER, RUNS, kept_checkpoint, outcome


def differing(found: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> list[str]:
    """The weights that are not equal, or are there on one side alone."""
    unequal = [name for name in found.keys() & kept.keys() if not torch.equal(found[name], kept[name])]
    return sorted([*unequal, *(found.keys() ^ kept.keys())])


def main() -> int:
    """Resume all of them."""
    expected: dict[str, Any] = torch.load(EARLIER / "expected.pt")
    lines, has_failed = [], False
    for name in RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint = kept_checkpoint(name, EARLIER, Path(temporary))
            ranks = outcome(name, EARLIER, Path(temporary, "run"), checkpoint)
        kept = expected[name]["end"]["weights"]
        others = sorted({weight for rank in ranks for weight in differing(rank["end"]["weights"], kept)})
        has_failed |= bool(others)
        lines.append(f"{name}: {'bitwise equal' if not others else f'{len(others)} of {len(kept)} weights differ'}")
    print("\n".join(lines))
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
