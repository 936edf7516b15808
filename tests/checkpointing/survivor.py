"""A run that says which phase it is in, records what it trains on, and can be killed and started again."""

import contextlib
import json
import os
import sys
import time
from datetime import timedelta
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path

from tests.forked import FORK, enter_rank, wait_until
from tests.ports import reserved_port

PHASES = ("rollout", "reward", "training", "checkpoint")


class Crew:
    """The processes of one run, one a rank; what rank 0 or the rank `watch` reports can be waited for.

    That rank goes on from a phase's begin once its report has been read: a busy machine does not let it get ahead.
    """

    def __init__(self, folder: Path, model: Path, strategy: str = "single", watch: int = 0, **options) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        world = 1 if strategy == "single" else 2
        self.reservation = contextlib.ExitStack()
        port = self.reservation.enter_context(reserved_port())
        self.reports, end = FORK.Pipe()
        self.processes = [
            FORK.Process(
                target=survive,
                args=(str(folder), str(model), rank, world, port, strategy, end if rank == watch else None, options),
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        end.close()

    def wait_for(self, phase: str, count: int = 1) -> bool:
        """Whether the phase has been entered so many times, rather than the run ended before."""
        while count:
            report = self.next_report()
            if report is None:
                return False
            count -= report == phase
        return True

    def next_report(self) -> str | None:
        """The next phase, or None once the watched process has ended."""
        try:
            report = self.reports.recv_bytes().decode()
            self.reports.send_bytes(b"read")
        except (EOFError, ConnectionError):
            return None
        return report

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def end(self, timeout: float = 120.0) -> list[int]:
        """Every process's exit code; those that are still there after the time are killed, and fail the test."""
        with contextlib.suppress(EOFError, OSError):
            while self.reports.poll(timeout) and self.next_report() is not None:
                pass
        limit = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, limit - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in hanging:
            self.processes[rank].kill()
            self.processes[rank].join()
        self.reservation.close()
        assert not hanging, f"ranks {hanging} hang:\n{self.errors(hanging[0])}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """What is left of it."""
        for process in self.processes:
            process.kill()
            process.join()
        self.reservation.close()

    def errors(self, rank: int = 0) -> str:
        return (self.folder / f"rank{rank}.err").read_text()


def survive(
    folder: str, model: str, rank: int, world: int, port: int, strategy: str, reports: Connection | None, options: dict
) -> None:
    """Start or go on with the run in `folder`, as one rank of it. Options: see `settings` and `train`."""
    enter_rank(folder, rank, world, port)
    train(Path(folder), model, rank, strategy, reports, **options)


def make_strategy(name: str, timeout: float):
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    wait = timedelta(seconds=timeout)
    if name == "ddp":
        return DDPStrategy(timeout=wait)
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, timeout=wait)
    return "auto"


def train(
    folder: Path,
    model: str,
    rank: int,
    strategy: str,
    reports: Connection | None,
    *,
    timeout: float = 120.0,
    sleep: int = -1,
    fail: int = -1,
    validate: bool = False,
    max_steps: int = 10,
    **trainer_arguments,
) -> None:
    """Train; `sleep`: a rank whose second reward takes until the file `wake` is there; `fail`: one whose raise then."""
    import lightning as L
    import torch

    from gvpo_lightning import (
        DemonstrationSettings,
        GenerationSettings,
        GVPOModule,
        ReferenceSettings,
        ReplaySettings,
        RolloutLoader,
        RolloutSettings,
        SourceSettings,
    )
    from gvpo_lightning.callbacks import RunCheckpoint
    from gvpo_lightning.distributed.ranks import DataRanks
    from gvpo_lightning.distributed.sharding import local_tensor

    torch.set_num_threads(1)
    num_rewards = 0

    def enter(phase: str) -> None:
        if reports is not None:
            reports.send_bytes(phase.encode())
            reports.recv_bytes()

    def reward(prompts, completions, answer):
        nonlocal num_rewards
        num_rewards += 1
        enter("reward")
        time.sleep(0.02)
        if sleep == rank and num_rewards == 2:
            wait_until((folder / "wake").exists, 200.0)
        if fail == rank and num_rewards >= 2:
            raise KeyError("no such answer")
        enter("rollout")
        return [float(text == a) + 0.01 * len(text) for text, a in zip(completions, answer, strict=True)]

    reward.in_process = True

    class Checkpoint(RunCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            enter("checkpoint")
            super()._save_checkpoint(trainer, filepath)

    class Recorder(L.Callback):
        """What was trained on: in every checkpoint, and in a file that no restart takes back."""

        def __init__(self):
            self.trained = []

        def state_dict(self):
            ranks = DataRanks(rank, 1 if strategy == "single" else 2)
            return {"trained": ranks.gather(self.trained)}  # a checkpoint holds rank 0's state

        def load_state_dict(self, state):
            self.trained = state["trained"][rank]

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            enter("training" if batch["slot"] else "rollout")

        def on_before_zero_grad(self, trainer, module, optimizer):
            enter("training")

        def on_train_batch_end(self, trainer, module, *_):
            if module.microstep % trainer.accumulate_grad_batches == 0:
                self.trained.append(what_was_trained(module))
                with open(folder / f"trained{rank}.jsonl", "a") as file:
                    file.write(json.dumps(self.trained[-1]) + "\n")

    L.seed_everything(0)
    module = GVPOModule(
        model,
        reward,
        reference=ReferenceSettings("ema", decay=0.5),
        sources=SourceSettings(replay=ReplaySettings(2), demonstrations=DemonstrationSettings("answer")),
        rollout=RolloutSettings(group_size=6, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=9),
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    rows = [{"prompt": f"{n}+{n % 7}=", "answer": str(n + n % 7)} for n in range(12)]
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=make_strategy(strategy, timeout),
        devices=1 if strategy == "single" else 2,
        max_steps=max_steps,
        accumulate_grad_batches=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[recorder, Checkpoint(folder / "checkpoints", every_n_train_steps=1)],
        **trainer_arguments,
    )
    validation = torch.utils.data.DataLoader(rows[:4], batch_size=2, collate_fn=list) if validate else None
    trainer.fit(module, RolloutLoader(rows, module), validation, ckpt_path="last")
    ended = {"weights": [local_tensor(p.detach()) for p in module.policy.parameters()], "trained": recorder.trained}
    torch.save(ended, folder / f"ended{rank}.pt")


def what_was_trained(module) -> dict:
    """The update's number, its prompts in order and a hash of the completions that they were trained with."""
    update = module.updates[(module.run.num_updates - 1) % len(module.updates)]
    rows = [row for rows in update.micro_batches for row in rows]
    batch = module.rollout.batch
    groups = batch.group_ids[rows].unique().tolist()
    ids = batch.completion_ids[rows].masked_fill(~batch.completion_mask[rows], 0)
    return {
        "update": module.run.num_updates - 1,
        "prompts": [module.rollout.prompts[group] for group in groups],
        "hash": sha256(ids.numpy().tobytes() + batch.rewards[rows].numpy().tobytes()).hexdigest(),
    }


def assert_the_same_as(through: Path, folder: Path, ranks: int) -> None:
    """Bitwise the weights of the uninterrupted run, and every prompt trained on once, in its order, as there."""
    import torch

    for rank in range(ranks):
        mine, theirs = torch.load(folder / f"ended{rank}.pt"), torch.load(through / f"ended{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(mine["weights"], theirs["weights"], strict=True))
        assert mine["trained"] == theirs["trained"]
        assert [record["update"] for record in mine["trained"]] == list(range(len(mine["trained"])))
        for line in (folder / f"trained{rank}.jsonl").read_text().splitlines():  # those that were trained again too
            record = json.loads(line)
            assert record == theirs["trained"][record["update"]]


if __name__ == "__main__":  # started by hand, so that Lightning's own launcher starts the second rank
    train(Path(sys.argv[1]), sys.argv[2], int(os.environ.get("LOCAL_RANK", 0)), sys.argv[3], None)
