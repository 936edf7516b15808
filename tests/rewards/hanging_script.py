"""A rank of two whose reward hangs on one of them."""

import math
import os

import lightning as L
from torch.nn.init import normal_

from gvpo_lightning import GenerationSettings, GVPOModule, RolloutLoader, RolloutSettings
from gvpo_lightning.rewards import RewardSettings
from tests.rewards.rewards_for_tests import hangs_where_told


def train(model: str) -> None:
    """Two updates on a rank of two; on rank 1 the reward hangs for one text."""
    L.seed_everything(0)
    os.environ["HANGS"] = "9" if os.environ["LOCAL_RANK"] == "1" else "never"
    module = GVPOModule(
        model,
        hangs_where_told,
        rollout=RolloutSettings(group_size=8, prompts_per_rollout=4, prompts_per_update=2),
        generation=GenerationSettings(max_new_tokens=1),
        reward_settings=RewardSettings(num_workers=1, timeout=2.0, max_failed_fraction=0.9),
    )
    module.configure_model()
    normal_(module.policy.get_output_embeddings().weight, std=0.001)  # all texts are as likely
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, RolloutLoader([{"prompt": f"{n}+1="} for n in range(4)], module))
    rollout = module.rollout
    hung = [math.isnan(value) for value in rollout.components["hangs_where_told"]]
    assert any(hung)
    assert {text for text, did in zip(rollout.completions, hung, strict=True) if did} == {"9"}
    assert (
        rollout.dropped["reward_timeout"] == sum(hung) == rollout.failures.counts["hangs_where_told", "reward_timeout"]
    )
    assert rollout.failures.asked == 32
    assert not any(kept for kept, did in zip(rollout.batch.kept.tolist(), hung, strict=True) if did)
