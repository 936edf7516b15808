"""Files and folders that are there whole or not at all: written under another name, flushed, renamed when done.

What a killed process leaves is hidden and ends in `.partial`, so that nothing takes it for whole.
"""

import os
import shutil
from pathlib import Path

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes have left in a folder, if there is one."""
    for path in folder.glob(f".*{PARTIAL}"):
        _delete(path)


def remove_whole(path: Path) -> None:
    """Remove a checkpoint such that a kill in the middle leaves no half of it."""
    if path.exists() or path.is_symlink():
        hidden = partial_path(path)
        path.rename(hidden)
        _delete(hidden)


def link_whole(target: Path, link: Path) -> None:
    """Make `link` a relative symlink to `target`, a file or folder beside it, in one step."""
    partial = partial_path(link)
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name)
    partial.replace(link)
    _flush(link.parent)


def _put_in_place(partial: Path, path: Path) -> None:
    for part in [*(partial.rglob("*") if partial.is_dir() else ()), partial]:
        _flush(part)
    if path.is_dir():  # a folder can't be replaced in one step
        remove_whole(path)
    partial.replace(path)
    _flush(path.parent)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
