"""An adapter from the settings: what is trained, what it is measured against, what a checkpoint holds of it."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gvpo_lightning import LoadingSettings, ReferenceSettings
from gvpo_lightning.reference import AdapterOffReference, ModelReference

pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUANTIZED = [None, pytest.param("nf4", id="nf4"), pytest.param("int8", id="int8")]


@pytest.fixture
def base(tiny_policy, tokenizer, tmp_path):
    """A folder with a small model and its tokenizer."""
    folder = tmp_path / "base"
    tiny_policy(3, hidden_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_loading(quantization, dtype="float32"):
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    return LoadingSettings(dtype, quantization=quantization)


def trace_rollouts(module):
    rollouts, original = [], module._roll_out
    module._roll_out = lambda rows, index: rollouts.append(original(rows, index)) or rollouts[-1]
    return rollouts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_frozen_reference_is_the_policy_without_its_adapter_to_the_bit(make_module, fit, base, dtype):
    settings = {"policy": base, "lora": LORA, "loading": LoadingSettings(dtype)}
    free = make_module(**settings)
    beside = make_module(reference=ReferenceSettings(model=base), **settings)
    runs = [trace_rollouts(free), trace_rollouts(beside)]
    for module in (free, beside):
        fit(module, max_steps=6)
    assert isinstance(free.reference, AdapterOffReference)
    assert isinstance(beside.reference, ModelReference)
    for rollout, other in zip(*runs, strict=True):
        assert torch.equal(rollout.batch.reference_logprobs, other.batch.reference_logprobs)
    trained = {p.dtype for p in free.policy.parameters() if p.requires_grad}
    frozen = {p.dtype for p in free.policy.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {getattr(torch, dtype)})
    moved = [p.abs().max() for n, p in free.policy.named_parameters() if "lora_B" in n]
    assert min(moved) > 0  # they start at 0


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_bitwise(
    make_module, fit, weights, base, tmp_path, quantization, checkpointing
):
    settings = {"policy": base, "lora": LORA, "gradient_checkpointing": checkpointing}
    settings["loading"] = make_loading(quantization)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    through = make_module(**settings)
    fit(through, max_steps=6, callbacks=[saver], enable_checkpointing=True)
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    torch.manual_seed(7)  # the adapter's own seed is the run's
    resumed = make_module(**settings)
    fit(resumed, max_steps=6, ckpt_path=tmp_path / "step=3.ckpt")
    assert torch.equal(weights(resumed), weights(through))
    with pytest.raises(ValueError, match=r"The checkpoint's adapter is another one.*Set model\.lora as it was"):
        fit(make_module(**settings | {"lora": LORA | {"r": 2}}), ckpt_path=tmp_path / "step=3.ckpt")
