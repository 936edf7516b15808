"""The line that resumes a run which has stopped before its end, in the words of who has started it."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

NOTHING = "No checkpoint has been saved: the same call starts the run from the beginning again."


class Command:
    """The command line that this process runs, and how it is to be called again once its run has stopped."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.line: str | None = None

    def stopped(self, path: str | None) -> None:
        """Take down how the run goes on: from this checkpoint, in place of the one that the command may name."""
        if path is None:
            self.line = NOTHING
            return
        kept, takes_value = [], False
        for word in self.words:
            if not takes_value and word != "--ckpt_path" and not word.startswith("--ckpt_path="):
                kept.append(word)
            takes_value = word == "--ckpt_path"
        self.line = shlex.join([*kept, "--ckpt_path", path])


COMMAND: ContextVar[Command | None] = ContextVar("command", default=None)


@contextmanager
def saying_how_to_resume(words: Sequence[str]) -> Iterator[None]:
    """Inside, a run that stops before its end leaves the command that resumes it as the last line on stderr.

    Where that is a traceback's, as the note of the exception.
    """
    command = Command(words)
    token = COMMAND.set(command)
    try:
        yield
    except SystemExit:
        if command.line is not None:
            print(command.line, file=sys.stderr, flush=True)
        raise
    except BaseException as error:
        if command.line is not None:
            error.add_note(command.line)
        raise
    finally:
        COMMAND.reset(token)


def call_that_resumes(path: str | None) -> str:
    """As `Command.stopped` has it, for a run that was started from Python."""
    return NOTHING if path is None else f"trainer.fit(..., ckpt_path={path!r})"
