"""Metrics must not make training wait for the device: what would, is counted, since there may be none here."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.updates.meters import UpdateMeter

# what reads a device's memory, or must know how much there is of something
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten._unique2", "aten.masked_select", "aten.is_nonzero")


class WaitCounter(TorchDispatchMode):
    """The files of ours, innermost, from which such operations come."""

    def __init__(self):
        super().__init__()
        self.files: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        is_mask = str(function).startswith("aten.index.Tensor") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if is_mask or str(function).startswith(WAITS):
            ours = [frame for frame in traceback.extract_stack() if "gvpo_" in frame.filename]
            self.files.append(Path(ours[-1].filename).name)
        return function(*arguments, **(keywords or {}))


def test_no_metric_waits_within_a_micro_batch(make_module, fit):
    module, counted = make_module(), []
    original = module.training_step

    def training_step(batch, batch_idx):
        with WaitCounter() as counter:
            result = original(batch, batch_idx)
        counted.append(counter.files)
        return result

    module.training_step = training_step
    fit(module, max_steps=2, accumulate_grad_batches=2)
    assert len(counted) == 4
    for files in counted:
        assert files  # the kernels' checks of what they are given, and the packing of tokens
        assert not {"meters.py", "guard.py", "module.py", "step.py"} & set(files)
        assert len(files) <= 26


def test_an_updates_metrics_reach_the_host_in_one_transfer(monkeypatch):
    # tensors on the meta device can't be read at all
    meter, transfers = UpdateMeter(), []
    for size in (3, 2):
        meter.add(torch.empty(size, device="meta"), torch.empty(7, device="meta"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.device.type) or torch.zeros(self.shape))
    finite = torch.empty((), dtype=torch.bool, device="meta")
    collected = meter.collect([[0, 4, 2], [1, 3]], 5, finite, DataRanks())
    assert transfers == ["meta"]
    assert collected.log_ratios.shape == (5,)
    assert (collected.entropy, collected.gradients_are_finite) == (0.0, True)


def test_what_is_logged_lies_in_host_memory(make_module, fit):
    module = make_module()
    logged = {}
    module.log_dict = lambda metrics, **_: logged.update(metrics)
    fit(module, max_steps=1)
    assert len(logged) > 20
    assert {type(value) for value in logged.values()} == {torch.Tensor}
    assert {value.device.type for value in logged.values()} == {"cpu"}


@pytest.mark.gpu
def test_what_is_logged_lies_in_host_memory_on_a_gpu(make_module, fit):
    module = make_module()
    logged = {}
    module.log_dict = lambda metrics, **_: logged.update(metrics)
    fit(module, max_steps=1, accelerator="gpu", devices=1)
    assert {value.device.type for value in logged.values()} == {"cpu"}
