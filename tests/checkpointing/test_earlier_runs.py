"""Checkpoints of an earlier version load, and their runs go on as that version would have gone on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import Qwen2ForCausalLM

from gvpo_lightning import GenerationSettings, GVPOModule, RolloutLoader, RolloutSettings
from gvpo_lightning.callbacks import RunCheckpoint
from tests.checkpointing.earlier_runs import (
    EARLIER,
    ROWS,
    RUNS,
    SIZES,
    TOKENIZER,
    UPDATES_AFTER,
    draws_by_seed,
    kept_checkpoint,
    outcome,
    reward,
)

# How far weights trained on another CPU may be from the kept ones, as a share of how far the kept ones have moved since
# the checkpoint. A gradient is a sum of some hundred float32 products, each rounded by up to 2**-24 of its size, so
# 1e-5 of it; where the group's residuals, whose sum is 0, nearly cancel each other, what is left of the gradient is
# several times smaller than its terms. With the instructions of older CPUs (ATEN_CPU_CAPABILITY=default and avx2, and
# MKL's likewise) the weights were at most 2e-6 of the way from those that AVX-512 had trained.
SHARE = 1e-4
# what forgetting something costs at the least, so that no rounding can hide it
FORGOTTEN = 100 * SHARE


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the version that wrote the checkpoints found and trained."""
    return torch.load(EARLIER / "expected.pt")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The outcome of a run that was resumed from its kept checkpoint, one entry a rank; each run is resumed once."""
    outcomes: dict[str, list[dict[str, Any]]] = {}

    def resume(name: str) -> list[dict[str, Any]]:
        if name not in outcomes:
            folder = tmp_path_factory.mktemp(name)
            outcomes[name] = outcome(name, EARLIER, folder, kept_checkpoint(name, EARLIER, folder))
        return outcomes[name]

    return resume


def assert_equal(found: Any, kept: Any, where: str) -> None:
    """Exactly, tensors included, and whatever is in there."""
    if isinstance(kept, dict):
        assert found.keys() == kept.keys(), where
        for key in kept:
            assert_equal(found[key], kept[key], f"{where}/{key}")
    elif isinstance(kept, torch.Tensor):
        assert found.dtype == kept.dtype, where
        assert torch.equal(found, kept), where
    else:
        assert found == kept, where


def share_of_the_way(rank: dict[str, Any], kept: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    """The largest distance of a rank's weights from the kept ones, over the largest way of those since `before`."""
    found = rank["end"]["weights"]
    assert found.keys() == kept.keys()
    way = max(float((kept[name] - before[name]).abs().max()) for name in kept)
    return max(float((found[name] - kept[name]).abs().max()) for name in kept) / way


def skip_where_other_numbers_are_drawn(expected: dict[str, Any]) -> None:
    """What comes after the next sampling can't be compared there: other completions are trained on."""
    if not torch.equal(draws_by_seed(), expected["draws"]):
        pytest.skip("this build of torch draws other numbers from a seed than the one that wrote the checkpoints")


@pytest.mark.parametrize("name", RUNS)
def test_an_earlier_checkpoint_loads_to_where_it_was_saved(name, resumed, expected):
    """Position, weights, momentum, learning rate, half-trained rollout and callbacks, all of them bit for bit."""
    for rank in resumed(name):
        assert_equal(rank["start"], expected[name]["start"], name)
    assert expected[name]["start"]["step"] == RUNS[name].saved_after
    assert (expected[name]["start"]["rollout"] is None) == (name == "file")  # the others are kept within a rollout


@pytest.mark.parametrize("name", RUNS)
def test_an_earlier_run_goes_on_as_it_would_have(name, resumed, expected):
    """Rounding can't change what is sampled: a draw would have to lie within some 1e-6 of where two tokens are even."""
    skip_where_other_numbers_are_drawn(expected)
    end = expected[name]["end"]
    for rank in resumed(name):
        for key in ("index", "prompts", "completions", "sources", "token_ids", "lengths", "group_ids", "rewards"):
            assert_equal(rank["end"]["rollout"][key], end["rollout"][key], key)
        logprobs, kept = rank["end"]["rollout"]["reference_logprobs"], end["rollout"]["reference_logprobs"]
        torch.testing.assert_close(logprobs, kept, rtol=SHARE, atol=SHARE)
        assert share_of_the_way(rank, end["weights"], rank["before"]) <= SHARE


def test_the_runs_do_what_they_are_kept_for(expected):
    """Each sampled anew after it was resumed, from what its checkpoint held."""
    for name in RUNS:
        start, end = expected[name]["start"]["rollout"], expected[name]["end"]["rollout"]
        assert start is None or end["index"] > start["index"], name
        assert len(set(end["rewards"].tolist())) > 1, name
    assert "replay" in expected["replay"]["end"]["rollout"]["sources"]
    assert expected["file"]["start"]["callbacks"]["summary"]["history"]


def forget_momentum(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"] = {}


def forget_schedule(checkpoint: dict[str, Any]) -> None:
    """And with it the learning rate that it had come to."""
    checkpoint["lr_schedulers"] = []
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    group["lr"] = 0.2 * group["initial_lr"]


def forget_rewards(checkpoint: dict[str, Any]) -> None:
    """The half-trained rollout's completions get those of others in place of their own."""
    rewards = checkpoint["gvpo"]["rollout"]["batch"]["rewards"]
    rewards.copy_(rewards.flip(0))


def forget_average(checkpoint: dict[str, Any]) -> None:
    """The reference starts anew from the policy."""
    weights = checkpoint["gvpo"]["reference"]["weights"]
    for name in weights:
        weights[name] = checkpoint["state_dict"][f"policy.{name}"].clone()


def forget_replay(checkpoint: dict[str, Any]) -> None:
    del checkpoint["gvpo"]["replay"]


@pytest.mark.parametrize(
    ("name", "forget"),
    [
        ("file", forget_momentum),
        ("file", forget_schedule),
        ("mid_rollout", forget_momentum),
        ("mid_rollout", forget_rewards),
        ("replay", forget_replay),
        ("ema", forget_average),
        ("lora", forget_momentum),
    ],
)
def test_whatever_is_forgotten_would_be_seen(
    name: str, forget: Callable[[dict[str, Any]], None], expected, resumed, tmp_path: Path
):
    """The bound on rounding hides nothing: a checkpoint without one of its parts ends far beyond it."""
    skip_where_other_numbers_are_drawn(expected)
    checkpoint = torch.load(EARLIER / f"{name}.ckpt")
    forget(checkpoint)
    torch.save(checkpoint, tmp_path / "forgetful.ckpt")
    (rank,) = outcome(name, EARLIER, tmp_path / "run", tmp_path / "forgetful.ckpt")
    assert share_of_the_way(rank, expected[name]["end"]["weights"], resumed(name)[0]["before"]) > FORGOTTEN


def test_a_fresh_run_would_be_seen(expected, resumed, tmp_path: Path):
    """As where a checkpoint was not loaded at all."""
    skip_where_other_numbers_are_drawn(expected)
    (rank,) = outcome("mid_rollout", EARLIER, tmp_path / "run", None, UPDATES_AFTER)
    kept = expected["mid_rollout"]["end"]["weights"]
    assert share_of_the_way(rank, kept, resumed("mid_rollout")[0]["before"]) > FORGOTTEN


def test_a_policy_object_that_was_saved_twice_loads(tmp_path):
    """Earlier versions had a policy that was given as an object in the state dict as `policy_source.*` too."""

    def fit(checkpoint: Path | None, num_updates: int) -> GVPOModule:
        L.seed_everything(0, verbose=False)
        policy = Qwen2ForCausalLM.from_pretrained(EARLIER / "model", dtype=torch.float32)
        settings = {"rollout": RolloutSettings(**SIZES), "generation": GenerationSettings(max_new_tokens=4)}
        module = GVPOModule(policy, reward, tokenizer=str(TOKENIZER), **settings)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=num_updates,
            callbacks=[RunCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, RolloutLoader(ROWS, module), ckpt_path=checkpoint)
        return module

    whole = fit(None, 2)
    path = tmp_path / "checkpoints" / "epoch=0-step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["state_dict"]
    weights |= {name.replace("policy.", "policy_source.", 1): value for name, value in weights.items()}
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    resumed = fit(tmp_path / "earlier.ckpt", 2)
    for ours, theirs in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
