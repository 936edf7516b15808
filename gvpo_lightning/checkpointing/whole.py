"""What can be resumed from: checkpoints that are whole, of a moment between two optimizer updates."""

import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LAST = re.compile(r"last(-v\d+)?\.ckpt")
NUM_NAMED = 5


def is_within_update(loop: Any, accumulate: int) -> bool:
    """Whether an optimizer update has begun and is not finished: what is saved then can't be resumed.

    Args:
        loop: Lightning's, over an epoch's micro-batches.
        accumulate: micro-batches of an update.
    """
    current = loop.batch_progress.current
    if current.started != current.processed:  # one is being trained, and may be in the middle of changing weights
        return True
    is_last = current.ready == current.processed and loop._num_ready_batches_reached()  # an epoch's, always stepped on
    return current.processed % accumulate != 0 and not is_last


def is_whole(path: str | Path) -> bool:
    """Whether there is a file to be read to its end, or a distributed checkpoint that its last file was written to."""
    path = Path(path)
    if path.is_dir():
        return (path / "meta.pt").is_file()
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:  # nothing there, a link that leads nowhere, or no permission
        return False
    return zipfile.is_zipfile(path) if start == b"PK" else bool(start)  # as torch writes it, or another plugin


def newest_last(paths: Iterable[Path]) -> Path | None:
    """Of the `last.ckpt` and `last-v1.ckpt` of one folder or several the newest; None where there is none.

    Raises:
        FileNotFoundError: it leads nowhere or is not whole; the whole checkpoints beside it are named.
    """
    found = [(path.lstat().st_mtime_ns, path) for path in paths if LAST.fullmatch(path.name)]
    if not found:
        return None
    newest = max(found)[1]
    if is_whole(newest):
        return newest
    found_as = f"is a link to {os.readlink(newest)}, which is gone or" if newest.is_symlink() else "is"
    others = [p for p in newest.parent.rglob("*.ckpt") if not LAST.fullmatch(p.name) and is_whole(p)]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    named = ", ".join(map(str, others[:NUM_NAMED])) + (", …" if len(others) > NUM_NAMED else "")
    mend = (
        f"give one of the whole checkpoints beside it, newest first: {named}" if others else "none beside it is whole"
    )
    raise FileNotFoundError(
        f"ckpt_path=last: {newest} {found_as} not whole: {mend}. To start from the beginning, remove {newest}."
    )
