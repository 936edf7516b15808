"""`RolloutLoader`: prompts for Lightning's fit loop, one batch an optimizer micro-batch.

Lightning's loop runs over micro-batches; only the first of a rollout brings prompts, the others train
on what was sampled then. The loader is sized, so that Lightning does not prefetch (a prefetched rollout
would come from stale weights), and is not a torch DataLoader, so that Lightning does not inject a
distributed sampler. It keeps no position of its own: it reads the module's `microstep` and `epoch`, which
checkpoints hold, and every order is a function of the seed; so a resumed run goes on where it was.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from gvpo_lightning.data.rows import Row, check_default_collate, rows_of
from gvpo_lightning.rollout.epoch import Epoch
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.seeding import derive_seed, seeded_permutation


class Trained(Protocol):
    """What a loader reads of the module that it feeds, which is a `GVPOModule`."""

    rollout_settings: RolloutSettings
    prompts: Any
    trainer: Any
    microstep: Any
    epoch: Any
    seed: int

    @property
    def micro_batches_per_rollout(self) -> int: ...  # noqa: D102


class RolloutLoader:
    """Feeds a `GVPOModule` with prompts.

    Args:
        prompts: a sequence of rows (dicts with a `prompt`, a string or a list of messages; every other key
            reaches the reward), such as a Hugging Face Dataset or a list; it is shuffled anew in every pass.
            Or your own torch DataLoader of such rows, whose order, sampler and collate function are kept.
        module: the module to be trained.

    Prompts are an endless stream of passes over the data: no prompt is left out where a pass is not a
    whole number of rollouts. One epoch of the Trainer is the whole rollouts of one pass, at least one.
    A fit without `ckpt_path` begins with an epoch, and a pass, of its own; so does one that is resumed with
    another number of prompts, once the rollout at hand is trained.

    Raises:
        ValueError: no rows, a row without a usable `prompt`, or a prompt that leaves no room for a
            completion in the model's context.
    """

    def __init__(self, prompts: "Sequence[Row] | DataLoader", module: Trained) -> None:
        self.prompts = prompts
        self.module = module
        try:
            num_prompts = count_prompts(prompts) if isinstance(prompts, DataLoader) else len(prompts)
        except TypeError as error:
            raise ValueError("The prompts must have a length: give RolloutLoader a map-style dataset.") from error
        if not num_prompts:
            raise ValueError("There are no prompts to train on: the dataset is empty.")
        if isinstance(prompts, DataLoader) and isinstance(prompts.sampler, DistributedSampler):
            raise ValueError(
                "Ranks share every rollout completion by completion, so all of them need the same prompts: give the "
                "DataLoader shuffle=True, or another sampler, in place of a DistributedSampler."
            )
        self.num_prompts = num_prompts
        self._pass: tuple[int, list[Row]] | None = None  # the pass over a DataLoader that is being read, by its seed
        dataset: Any = prompts.dataset if isinstance(prompts, DataLoader) else prompts
        module.prompts.check_training([dataset[index] for index in range(len(dataset))])
        if isinstance(prompts, DataLoader) and prompts.collate_fn is default_collate:
            check_default_collate(dataset[0])

    @property
    def rollouts_per_epoch(self) -> int:
        """Whole rollouts in one pass over the prompts, at least one."""
        return max(1, self.num_prompts // self.module.rollout_settings.prompts_per_rollout)

    def __len__(self) -> int:
        return self.rollouts_per_epoch * self.module.micro_batches_per_rollout

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is the module's. Its presence tells Lightning that resuming is safe."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch: Epoch = self.module.epoch
        micro_batches, start = self.module.micro_batches_per_rollout, self.module.microstep
        length = int(min(len(self), self.module.trainer.num_training_batches))  # limit_train_batches may cut an epoch
        end = epoch.begin(start, length, self.num_prompts, math.ceil(start / micro_batches))
        for step in range(start, end):
            rollout, slot = divmod(step, micro_batches)
            yield {"rows": self._rollout_rows(rollout, epoch) if slot == 0 else None, "slot": slot, "rollout": rollout}

    def _rollout_rows(self, rollout: int, epoch: Epoch) -> list[Row]:
        """The rows of the given rollout, of all ranks, cut from the stream of passes."""
        size = self.module.rollout_settings.prompts_per_rollout
        rows: list[Row] = []
        while len(rows) < size:
            number, position = epoch.find(rollout, len(rows), size)
            more = self._pass_rows(epoch.order(number), position, size - len(rows))
            if not more:
                raise ValueError(
                    f"The DataLoader gave {position} prompts, but its sampler promised {self.num_prompts}."
                )
            rows += more
        return rows

    def _pass_rows(self, order: tuple[int | str, ...], start: int, count: int) -> list[Row]:
        """Up to `count` rows of one pass over the prompts, from position `start`; `order`: what it is drawn for."""
        if isinstance(self.prompts, DataLoader):
            seed = derive_seed(self.module.seed, *order)
            if self._pass is None or self._pass[0] != seed:
                with seeded_order(self.prompts, seed):
                    self._pass = (seed, [row for batch in self.prompts for row in rows_of(batch)])
            return self._pass[1][start : start + count]
        numbers = seeded_permutation(self.num_prompts, self.module.seed, *order)
        return [self.prompts[index] for index in numbers[start : start + count]]


def count_prompts(loader: DataLoader) -> int:
    """Rows in one pass over a DataLoader.

    Raises:
        ValueError: it makes no batches.
        TypeError: it has no length.
    """
    if loader.batch_sampler is None:
        raise ValueError("The DataLoader of prompts must make batches: give it a batch_size.")
    if loader.batch_size is None:  # a batch sampler of the user's own
        with seeded_order(loader, 0):
            return sum(len(batch) for batch in loader.batch_sampler)
    num_prompts = len(loader.sampler)  # type: ignore[arg-type]
    return num_prompts - num_prompts % loader.batch_size if loader.drop_last else num_prompts


@contextmanager
def seeded_order(loader: DataLoader, seed: int) -> Iterator[None]:
    """Whatever the loader's order is drawn from starts from `seed` inside; random states are put back after."""
    own = [g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None]
    states = [generator.get_state() for generator in own]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what shuffle=True draws from where there is no generator
        for generator in own:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)
