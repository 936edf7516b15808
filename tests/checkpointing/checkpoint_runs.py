"""What test_checkpoint runs in processes of its own: a network small enough to save dozens of times a second."""

import os
import resource
import signal
import sys
from pathlib import Path


def network(folder: Path, strategy: str = "single", steps: int = 4, callback=None, **trainer_arguments):
    """A Lightning trainer and module; with "fsdp2" sharded over two ranks, so that checkpoints are folders."""
    import lightning as L
    import torch

    from gvpo_lightning.callbacks import RunCheckpoint
    from tests.checkpointing.survivor import make_strategy

    class Network(L.LightningModule):
        def configure_model(self):
            if not hasattr(self, "layer"):
                torch.manual_seed(0)
                self.layer = torch.nn.Linear(8, 8)
                if strategy == "fsdp2":
                    from torch.distributed.fsdp import fully_shard

                    fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=make_strategy(strategy, 120.0),
        devices=1 if strategy == "single" else 2,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback or RunCheckpoint(folder / "checkpoints", every_n_train_steps=1)],
        **trainer_arguments,
    )
    data = torch.utils.data.DataLoader(torch.arange(80.0).view(10, 8), batch_size=1)
    return trainer, Network(), data


def fit(
    folder: str,
    rank: int,
    port: int,
    strategy: str,
    steps: int,
    die_at: int = -1,
    die_writing: int = -1,
    full_at: int = -1,
) -> None:
    """Train from `last` for so many steps in all.

    Rank 0 dies right before the given change of the file system, or when half of the given step's file is written; at
    the step `full_at` its files can't get larger than 1 KB, as on a full disk.
    """
    os.dup2(os.open(f"{folder}/rank{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if strategy != "single":
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer, module, data = network(Path(folder), strategy, steps)
    if rank == 0:
        if full_at < 0:  # the list of changes would get too large as well
            sys.addaudithook(Killer(f"{folder}/checkpoints", die_at))
        trainer.callbacks[:0] = [make_bomb(die_writing), make_limit(full_at)]
    trainer.fit(module, data, ckpt_path="last")


def make_bomb(step: int):
    """A callback whose state of the given step can't be written by a process that lives on."""
    import lightning as L

    class Bomb(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.is_armed = trainer.global_step == step

        def state_dict(self):
            return {"fuse": Fuse()} if self.is_armed else {}

    return Bomb()


def make_limit(step: int):
    """A callback after which no file can be written whole."""
    import lightning as L

    class Limit(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return Limit()


class Fuse:
    """Kills the process that pickles it, which is when torch has opened the file."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Counts what changes a folder (files opened for writing, renamed, linked, removed), and kills at one of them."""

    CHANGES = ("os.rename", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self, folder: str, die_at: int) -> None:
        self.folder, self.die_at, self.count = folder, die_at, 0
        self.log = os.open(f"{os.path.dirname(folder)}/changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wxa"
        if not (writes or event in self.CHANGES) or not any(self.folder in str(arg) for arg in args[:2]):
            return
        os.write(self.log, f"{event} {args[0]}\n".encode())
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def command(folder: str, words: list[str]) -> None:
    """`gvpo` with these words in a folder; what it says on stderr goes to the file `err`."""
    os.chdir(folder)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    from gvpo_lightning.cli import main

    main(words)
