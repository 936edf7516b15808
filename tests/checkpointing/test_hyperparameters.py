"""A module that saves its hyperparameters: its checkpoints load with weights_only=True, as Lightning resumes them."""

import enum

import pytest
import torch

from gvpo_lightning import GenerationSettings, GVPOModule, RolloutSettings
from gvpo_lightning.callbacks import RunCheckpoint
from tests.conftest import digit_reward

ROLLOUT = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4)


class Speed(enum.StrEnum):
    FAST = "fast"


class Saves(GVPOModule):
    """All that it is given."""

    def __init__(self, policy: str, label: str = "none", sizes: tuple[int, ...] = (), speed: str = "slow", **kwargs):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters()


class SavesSome(GVPOModule):
    """All but what is hard to save, as Lightning's pages advise."""

    def __init__(self, policy: str, label: str = "none", sizes: tuple[int, ...] = (), speed: str = "slow", **kwargs):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["reward", "optimizer", "rollout", "generation", "speed"])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("kind", [Saves, SavesSome])
def test_it_resumes_and_is_loaded_with_its_own_plain_arguments(kind, fit, weights, arithmetic, tmp_path):
    def build() -> GVPOModule:
        settings = {"rollout": ROLLOUT, "generation": GenerationSettings(max_new_tokens=4), "beta": 0.5}
        own = {"label": "mine", "sizes": (1, 2), "speed": Speed.FAST}
        return kind(str(arithmetic / "model"), reward=digit_reward, optimizer=sgd, **settings, **own)

    through, saver = build(), RunCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 4, "enable_checkpointing": True, "callbacks": [saver]}
    if kind is Saves:
        with pytest.warns(
            UserWarning, match="no plain values are not in the checkpoints: generation, optimizer, reward"
        ):
            fit(through, **options)
    else:
        fit(through, **options)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["hyper_parameters"]
    assert saved == {"policy": str(arithmetic / "model"), "label": "mine", "sizes": (1, 2), "beta": 0.5}

    resumed = build()
    fit(resumed, max_steps=4, ckpt_path=tmp_path / "step=3.ckpt")
    assert torch.equal(weights(resumed), weights(through))

    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt", reward=digit_reward, rollout=ROLLOUT, weights_only=True)
    assert torch.equal(weights(loaded), weights(through))
    assert (loaded.beta, loaded.rollout_settings, loaded.hparams["label"]) == (0.5, ROLLOUT, "mine")
