"""What a model does to its logits after the head: found out, fused, and refused where it is something else."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from gvpo_lightning.policy.head import LogitMap, Scoring, completion_logprobs, find_logit_map, padded_inputs
from gvpo_lightning.policy.head_check import check_logprob_head
from gvpo_lightning.policy.prepare import prepare_policy
from tests.error_budget import assert_within, logprob_budget, sum_budget
from tests.policy.conftest import CHANGED, SIZES


class ChangesItsLogits(Qwen2ForCausalLM):
    """A Qwen2 that applies `change` to its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.fixture
def changing():
    """Builds a tiny random model that applies the given function to its logits."""

    def build(change):
        torch.manual_seed(0)
        model = ChangesItsLogits(Qwen2ForCausalLM.config_class(**SIZES))
        model.change = change
        prepare_policy(model)
        return model

    return build


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2", LogitMap()),
        ("gemma2-softcap", LogitMap(softcap=3.0)),
        ("gemma3-softcap", LogitMap(softcap=2.0)),
        ("cohere-scaled", LogitMap(0.3)),
        ("granite-scaled", LogitMap(1 / 6)),
        ("hyperclovax-scaled", LogitMap(0.5)),
    ],
)
def test_it_is_found(build_model, name, expected):
    model = build_model(name)
    prepare_policy(model)
    found = find_logit_map(model)
    assert found.scale == pytest.approx(expected.scale, rel=1e-12)
    assert found.softcap == expected.softcap


def scaled_then_capped(logits):
    return 2 * torch.tanh(logits * 0.4 / 2)


def capped_then_scaled(logits):
    return 3 * torch.tanh(logits) * 0.5


def scaled_in_place(logits):
    return logits.mul_(0.7)


def capped_in_float32(logits):
    return 2 * torch.tanh(logits.float() / 2)


@pytest.mark.parametrize("change", [scaled_then_capped, capped_then_scaled, scaled_in_place, capped_in_float32])
def test_any_scale_and_cap_is_fused(changing, ragged, change):
    model = changing(change)
    assert check_logprob_head(model) < float(sum_budget(1.0))
    ours, _ = completion_logprobs(model, ragged, Scoring(0.8))
    inputs, _ = padded_inputs(ragged)
    logits = model(**inputs).logits[:, ragged.prompt_ids.shape[1] - 1 : -1]
    theirs = torch.log_softmax(logits / 0.8, dim=-1).gather(-1, ragged.completion_ids[..., None]).squeeze(-1)
    assert_within(ours, theirs * ragged.completion_mask, logprob_budget(logits / 0.8))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.clamp(-1, 1),  # a cap, but a hard one
        lambda logits: 3 * torch.atan(logits / 3),
        lambda logits: -logits,
        lambda logits: logits + 1,
        lambda logits: logits.square(),
        lambda logits: torch.log_softmax(logits, dim=-1) * 2,
        lambda logits: 0 * logits,
    ],
)
def test_anything_else_is_refused(changing, change):
    with pytest.raises(ValueError, match="ChangesItsLogits changes its logits after the head in a way that is not"):
        check_logprob_head(changing(change))


def test_what_is_done_to_some_entries_alone_is_refused(changing):
    """The numbers that the head gives don't show it; the comparison with the model's own logits does."""

    def last_entries_excluded(logits):
        return torch.cat([logits[..., :15], logits[..., 15:] - 5], dim=-1) if logits.shape[-1] == 23 else logits

    with pytest.raises(ValueError, match=r"differ by .* from those of its own logits"):
        check_logprob_head(changing(last_entries_excluded))


@pytest.mark.parametrize("name", CHANGED)
def test_plain_calls_and_the_config_stay_as_they_are(build_model, ragged, name):
    model = build_model(name)
    ids = torch.tensor([[3, 4, 5]])
    before, config = model(ids).logits, model.config.to_dict()
    prepare_policy(model)
    completion_logprobs(model, ragged)
    assert torch.equal(model(ids).logits, before)
    differing = {key for key, value in model.config.to_dict().items() if value != config[key]}
    assert not {key for key in differing if "drop" not in key}
