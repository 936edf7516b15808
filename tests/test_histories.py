"""What a module does next depends on its weights and its position, whatever was done with it before.

Random histories of one module (fit, fit on other data, resume, validate, test, predict, save, load, export) are taken
step by step. After each step the module must be, bit for bit, what a new one is after this step alone, from the
weights and the number of rollouts that the history has come to.
"""

import random

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from gvpo_lightning import (
    GenerationSettings,
    GVPOModule,
    ReferenceSettings,
    ReplaySettings,
    RolloutLoader,
    RolloutSettings,
    SourceSettings,
)
from tests.conftest import digit_reward

UPDATES_PER_ROLLOUT = 2
KINDS = {
    "folder": {},
    "object": {},
    "lora": {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}},
    "adapter_off": {"lora": {"r": 4, "target_modules": "all-linear"}},
    "previous": {"reference": "previous"},
    "ema": {"reference": ReferenceSettings("ema", decay=0.5)},
    "replay": {"sources": SourceSettings(policy=2, replay=ReplaySettings(count=2))},
}
STEPS = ["fit", "fit", "resume", "validate", "test", "predict", "save", "load", "export"]


class Prompts(Callback):
    """The prompts that a fit was given."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen += [row["prompt"] for row in batch["rows"] or ()]


class History:
    """One module, and what must be true of it."""

    def __init__(self, kind, folder, make_policy, tokenizer, draw):
        self.kind, self.folder, self.make_policy, self.tokenizer, self.draw = kind, folder, make_policy, tokenizer, draw
        self.module = self.new_module()
        self.rollouts = 0  # that the module has begun, by our own count
        self.checkpoints = []  # each with the data and limits of the fit that it is of
        self.number = 0
        self.steps = []  # for the message of a failure

    def arguments(self):
        return {
            "policy": self.make_policy(0) if self.kind == "object" else str(self.folder / "policy"),
            "reward": digit_reward,
            "tokenizer": self.tokenizer,
            "beta": 0.5,
            "rollout": RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4),
            "generation": GenerationSettings(max_new_tokens=3),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
            **KINDS[self.kind],
        }

    def new_module(self):
        return GVPOModule(**self.arguments())

    def path(self, name):
        self.number += 1
        return self.folder / f"{self.number} {name}"

    def trainer(self, *callbacks, **options):
        return L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            default_root_dir=self.folder,
            callbacks=list(callbacks),
            **options,
        )

    def rows(self, count, first=0):
        return [{"prompt": f"{n}+{n % 7}=", "answer": "1"} for n in range(first, first + count)]

    def twin(self):
        """A new module with the weights of this one, which must be all that it has of its history beside a count."""
        twin = self.new_module()
        if self.module.policy is None or not self.module.state_dict():
            return twin  # nothing has been done yet
        twin.configure_model()
        twin.load_state_dict(self.module.state_dict())
        return twin

    def assert_like(self, other):
        ours, theirs = self.module.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys(), self.steps
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), self.steps

    # -- the steps

    def fit(self):
        options = self.draw.choice([{"max_epochs": 1}, {"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}])
        options |= {"accumulate_grad_batches": self.draw.choice([1, 2])}
        count = self.draw.choice([8, 16, 24, 27])
        twin = self.twin()
        folder, prompts = self.path("fit"), Prompts()
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = self.trainer(saver, prompts, **options)
        trainer.fit(self.module, RolloutLoader(self.rows(count), self.module))
        expected = 3 if "max_steps" in options else options["max_epochs"] * (count // 8) * UPDATES_PER_ROLLOUT
        assert trainer.global_step == expected, self.steps
        begun = -(-expected // UPDATES_PER_ROLLOUT)
        assert len(prompts.seen) == 8 * begun
        whole = prompts.seen[:count]
        assert len(set(whole)) == len(whole), self.steps  # a pass of its own, and no prompt twice in it
        if not self.remembers:
            twin.run.microstep = self.rollouts * UPDATES_PER_ROLLOUT  # in the units of no accumulation
            twin.run.rollout_length = UPDATES_PER_ROLLOUT
            self.trainer(**options).fit(twin, RolloutLoader(self.rows(count), twin))
            self.assert_like(twin)
        self.rollouts += begun
        self.checkpoints += [(folder / f"step={step}.ckpt", count, options) for step in range(1, expected + 1)]
        self.resume_of(folder / f"step={self.draw.randint(1, expected)}.ckpt", count, options)

    @property
    def remembers(self):
        """Whether a fit goes on from more than the weights and the count.

        So do averages and replayed completions, and the frozen weights of a policy that lies in no folder: they are
        what the first fit found.
        """
        return self.kind in ("object", "ema", "replay")

    def resume_of(self, path, count, options):
        """A new module that goes on from within the fit ends where this one has ended."""
        resumed = self.new_module()
        self.trainer(**options).fit(resumed, RolloutLoader(self.rows(count), resumed), ckpt_path=path)
        self.assert_like(resumed)
        assert resumed.microstep == self.module.microstep

    def resume(self):
        """This module resumes like a new one, whatever fit the checkpoint is of, on its data or on others."""
        if not self.checkpoints:
            return self.fit()
        path, count, options = self.draw.choice(self.checkpoints)
        count = self.draw.choice([count, count, 16, 24])
        options = options | {"max_epochs": 3} if "max_steps" not in options else options | {"max_steps": 5}
        fresh, seen = self.new_module(), []
        for module in (self.module, fresh):
            seen.append(Prompts())
            trainer = self.trainer(seen[-1], **options)
            trainer.fit(module, RolloutLoader(self.rows(count), module), ckpt_path=path)
        self.assert_like(fresh)
        assert seen[0].seen == seen[1].seen
        assert self.module.microstep == fresh.microstep
        accumulate = options["accumulate_grad_batches"]
        self.rollouts = -(-self.module.microstep // (UPDATES_PER_ROLLOUT * accumulate))

    def evaluate(self, stage, path=None, module=None):
        prompts = DataLoader(self.rows(6, first=50), batch_size=4, collate_fn=list)
        trainer = self.trainer()
        options = {} if stage == "predict" else {"verbose": False}
        return getattr(trainer, stage)(module or self.module, prompts, ckpt_path=path, **options)

    def evaluation(self, stage):
        before, twin = self.module.microstep, self.twin()
        assert self.evaluate(stage) == self.evaluate(stage, module=twin), self.steps
        self.assert_like(twin)
        assert self.module.microstep == before

    def validate(self):
        self.evaluation("validate")

    def test(self):
        self.evaluation("test")

    def predict(self):
        self.evaluation("predict")

    def save(self):
        """What was saved is loaded without a trainer, and brings the weights."""
        if self.module.policy is None or self.module._trainer is None:
            return self.validate()
        path = self.path("now.ckpt")
        self.module.trainer.save_checkpoint(path)
        loaded = GVPOModule.load_from_checkpoint(path, **self.arguments())
        self.assert_like(loaded)
        assert loaded.microstep == 0

    def load(self):
        """The weights of a checkpoint, and nothing else of it."""
        if not self.checkpoints:
            return self.fit()
        path, before = self.draw.choice(self.checkpoints)[0], self.module.microstep
        self.evaluate(self.draw.choice(["validate", "test", "predict"]), path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(tensor, saved[name]) for name, tensor in self.module.state_dict().items()), self.steps
        assert self.module.microstep == before

    def export(self):
        if self.module.policy is None:
            return self.validate()
        folder, is_adapted = self.path("export"), "lora" in KINDS[self.kind]
        self.module.export(folder)
        if is_adapted:
            import peft

            model = AutoModelForCausalLM.from_pretrained(self.folder / "policy")
            found = peft.PeftModel.from_pretrained(model, folder).state_dict()
        else:
            found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        own = self.module.policy.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in own.items()), self.steps

    def take(self, step):
        self.steps.append(step)
        getattr(self, step)()


ALWAYS = ("folder", "object", "lora", "replay")  # with one seed each; the rest where there is time


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=[] if kind in ALWAYS and not seed else pytest.mark.slow)
        for kind in KINDS
        for seed in range(12)
    ],
)
def test_a_step_depends_on_weights_and_position_alone(kind, seed, tiny_policy, tokenizer, tmp_path):
    tiny_policy(3).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    draw = random.Random(f"{kind} {seed}")
    history = History(kind, tmp_path, tiny_policy, tokenizer, draw)
    for step in draw.choices(STEPS, k=6):
        history.take(step)
