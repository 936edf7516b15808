"""Files and folders that are there whole or not at all: written under another name, flushed, renamed when done.

What a killed process leaves is hidden and ends in `.partial`, so that nothing takes it for whole.
"""

import glob
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the name `path` when all is written; nothing if that fails."""
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):  # by a killed process
        delete(left)
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        delete(partial)


def write_whole(path: Path, text: str) -> None:
    """A whole text file; an earlier one is there until the new one is complete."""
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put_in_place(partial: Path, path: Path) -> None:
    """Give what has been written its name; an earlier file is replaced, and an earlier folder removed first."""
    for part in [*(partial.rglob("*") if partial.is_dir() else ()), partial]:
        _flush(part)
    if path.is_dir():  # a folder can't be replaced in one step
        remove_whole(path)
    partial.replace(path)
    _flush(path.parent)


def remove_partials(folder: Path, *, deeply: bool = False) -> None:
    """Remove what killed processes have left in a folder, if there is one; `deeply`: and in those within it."""
    for path in list((folder.rglob if deeply else folder.glob)(f".*{PARTIAL}")):
        delete(path)


def remove_whole(path: Path) -> None:
    """Remove a file or folder such that a kill in the middle leaves no half of it."""
    if path.exists() or path.is_symlink():
        hidden = partial_path(path.with_name(f"{path.name}.removed"))
        path.rename(hidden)
        delete(hidden)


def remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder and those that it lies in, up to `root`, as far as nothing is in them."""
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:  # something is
            return
        folder = folder.parent


def link_whole(target: Path, link: Path) -> None:
    """Make `link` a relative symlink to `target`, a file or folder beside it or further down, in one step."""
    partial = partial_path(link)
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, link.parent))
    partial.replace(link)
    _flush(link.parent)


def keep_old(path: Path) -> None:
    """Rename what an earlier run has left there, which would be overwritten: metrics.1.csv, evaluation.1 and so on."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def delete(path: Path) -> None:
    """Remove a file or folder, if it is there."""
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
