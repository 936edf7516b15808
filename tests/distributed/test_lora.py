"""Real processes: an adapter from the settings trains alike under every strategy, resumes bitwise, and is exported."""

import pytest
import torch
from safetensors.torch import load_file

from gvpo_lightning.policy.loading import LoadingSettings
from tests.distributed.lora_script import main
from tests.distributed.train_script import STRATEGIES
from tests.forked import run_ranks

pytest.importorskip("peft")


@pytest.fixture
def run(arithmetic, tmp_path):
    """Rank 0's results under a strategy; all ranks have sampled and trained the same."""

    def train(name, **loading):
        world = STRATEGIES[name]()[1]
        run_ranks(tmp_path, world, main, str(arithmetic / "model"), tmp_path, name, LoadingSettings(**loading))
        first, *others = [torch.load(file, weights_only=True) for file in sorted(tmp_path.glob(f"{name} ?.pt"))]
        assert first["kind"] == "AdapterOffReference"
        for rank in others:
            assert torch.equal(rank["reference"], first["reference"])
        resumed = first["resumed"]
        assert resumed.keys() == first["through"].keys()
        assert all(torch.equal(resumed[key], value) for key, value in first["through"].items())
        assert min(float(value.abs().max()) for key, value in resumed.items() if "lora_B" in key) > 1e-3
        exported = load_file(tmp_path / f"export-{name}" / "adapter_model.safetensors")
        for key, value in first["through"].items():
            assert torch.equal(exported[key.replace(".default", "")], value)
        return first["through"]

    return train


def largest_difference(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def test_fsdp2_trains_the_adapter_that_ddp_trains(run):
    # two ranks' gradients have one sum; only the norm that clips them is summed in another order, and AdamW's steps of
    # 1e-2 do not depend on it but for roundings
    assert largest_difference(run("fsdp2", dtype="bfloat16"), run("ddp", dtype="bfloat16")) <= 1e-5


@pytest.mark.slow
def test_fsdp1_and_fsdp2_with_tensor_parallelism_train_the_adapter_that_ddp_trains(run):
    one = run("ddp")
    for name in ("fsdp1", "fsdp2_tp"):
        assert largest_difference(run(name), one) <= 1e-3


@pytest.mark.slow
def test_tensor_parallelism_trains_the_adapter_that_one_device_trains(run):
    assert largest_difference(run("tp"), run("single")) <= 1e-3


@pytest.mark.slow
def test_a_quantized_policy_is_trained_by_ddp(run):
    pytest.importorskip("bitsandbytes")
    run("ddp", quantization="nf4")


@pytest.mark.parametrize(
    ("name", "loading", "message"),
    [
        ("fsdp2", {"quantization": "nf4"}, r"quantization='nf4' can't be sharded, got ModelParallelStrategy"),
        ("fsdp1", {"dtype": "bfloat16"}, r"FSDPStrategy can't hold a float32 adapter .* use FSDP2"),
    ],
)
def test_what_can_not_be_sharded_is_refused(run, name, loading, message):
    if "quantization" in loading:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(AssertionError, match=message):
        run(name, **loading)
