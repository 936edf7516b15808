"""How many files a reader opens who follows one optimizer update with its rollout, and how often the file changes.

    python -m benchmarks.file_changes      # some seconds on one core

The second rollout of a small run, with its one update, is traced. A call of a function of `gvpo_lightning` that lies in
another file than the call before it counts as one change. `--files` shows between which files they are.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

import gvpo_lightning
from gvpo_lightning import GenerationSettings, GVPOModule, RolloutLoader, RolloutSettings

PACKAGE = Path(gvpo_lightning.__file__).parent
POLICY = Path(__file__).parent.parent / "configs" / "arithmetic" / "model"


class Tracer(L.Callback):
    """Notes the file of every call while the second rollout is collected and trained."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Begin before the rollout."""
        if trainer.global_step == 1:
            sys.setprofile(self._note)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """End after the update."""
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            self.calls.append(str(Path(path).relative_to(PACKAGE)))


def digits(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of digits above 4."""
    return [sum(character in "56789" for character in text) / 4 for text in completions]


digits.in_process = True  # type: ignore[attr-defined]


def trace() -> list[str]:
    """The files of one update's calls, in their order."""
    L.seed_everything(0, verbose=False)
    prompts = [{"prompt": f"{number}+{number % 7}="} for number in range(64)]
    module = GVPOModule(
        str(POLICY),
        digits,
        rollout=RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=8),
        generation=GenerationSettings(max_new_tokens=4),
    )
    tracer = Tracer()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[tracer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, RolloutLoader(prompts, module))
    return tracer.calls


def changes(calls: Sequence[str]) -> list[tuple[str, str]]:
    """The file before and the file after, where they differ."""
    return [(before, after) for before, after in itertools.pairwise(calls) if before != after]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="show between which files")
    options = parser.parse_args(arguments)
    calls = trace()
    found = changes(calls)
    print(f"{len(found)} changes of file, in {len(set(calls))} files")
    for (before, after), count in Counter(found).most_common() if options.files else ():
        print(f"{count:4d}  {before} -> {after}")


if __name__ == "__main__":
    main()
