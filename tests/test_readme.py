"""The README's code runs as it stands, and what it says about itself is true."""

import re

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from gvpo_lightning.policy.prepare import load_policy


@pytest.fixture(autouse=True)
def rewards_in_process():
    """As readers have it: in workers."""


@pytest.fixture
def blocks(root, monkeypatch):
    monkeypatch.chdir(root)  # the README's paths are relative to the repository
    return re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)


def test_readme_is_short_and_its_examples_too(root, blocks):
    assert len((root / "README.md").read_text().splitlines()) <= 150
    assert [sum(bool(line) for line in block.splitlines()) <= 15 for block in blocks] == [True, True]


def test_own_trainer_around_the_module(blocks, tmp_path, monkeypatch):
    code = blocks[0].replace("max_steps=8", f"max_steps=8, default_root_dir={str(tmp_path)!r}, accelerator='cpu'")
    names = {}
    exec(code, names)
    assert names["trainer"].global_step == 8
    assert float(names["trainer"].callback_metrics["loss"]) > 0


def test_loss_inside_an_own_module(blocks, root):
    names = {}
    exec(blocks[1], names)
    module = names["MyModule"]()
    ids = torch.tensor([[4, 13, 5, 14, 6, 1], [4, 13, 5, 14, 7, 1], [5, 13, 5, 14, 7, 1], [5, 13, 5, 14, 8, 1]])
    reference = load_policy(str(root / "configs" / "arithmetic" / "model"))
    with torch.no_grad():
        logprobs = reference(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    rows = {
        "ids": ids,
        "reference": logprobs,
        "mask": torch.tensor([[0, 0, 0, 1, 1]] * 4),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "groups": torch.tensor([0, 0, 1, 1]),
    }
    data = [{name: values[i] for name, values in rows.items()} for i in range(4)]
    trainer = L.Trainer(
        max_steps=200, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    assert float(trainer.callback_metrics["implicit_reward/slope"]) > 0.5  # on its way to 1, from 0
