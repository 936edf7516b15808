"""Whole fits with `padding_free`: the weights of padded ones, for every family; refusals before anything is sampled."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_lightning import GenerationSettings, ReferenceSettings, RolloutSettings
from tests.policy.conftest import ARCHITECTURES, FLOAT32_ALONE, FLOAT32_INSIDE, SIZES

FAMILIES = [name for name in ARCHITECTURES if name not in ("qwen2-tied", "gemma3-softcap", "granite-tied")]
PADDED_ALONE = ("opt", "falcon")


@pytest.fixture
def build(tokenizer):
    """Builds a tiny random model of one of `ARCHITECTURES` for the character tokenizer."""

    def from_name(name, **overrides):
        torch.manual_seed(0)
        settings = SIZES | {"vocab_size": len(tokenizer)} | ARCHITECTURES[name] | overrides
        if name == "gpt2":
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
                settings.pop(key)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))

    return from_name


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in FAMILIES), *((name, True) for name in ("qwen2", "llama", "gemma3", "cohere-scaled"))],
)
def test_two_updates_end_with_the_same_weights(build, make_module, fit, weights, name, tied):
    """Three sequential micro-batches an update, so that groups are cut; against a reference that moves."""
    arguments = {
        "optimizer": sgd,
        "reference": ReferenceSettings("ema", decay=0.5),
        "rollout": RolloutSettings(group_size=3, prompts_per_rollout=2, prompts_per_update=2, micro_batch_size=3),
    }
    ends, rounds = [], name in FLOAT32_ALONE
    for padding_free in (False, True) if name not in PADDED_ALONE else (False,):
        policy = build(name, tie_word_embeddings=tied, initializer_range=0.1)
        start = torch.cat([parameter.detach().flatten().clone() for parameter in policy.parameters()])
        module = make_module(policy=policy, padding_free=padding_free, **arguments)
        fit(module, max_steps=2, accumulate_grad_batches=3, precision="32-true" if rounds else "64-true")
        ends.append(weights(module))
        assert (ends[-1] - start).abs().max() > 1e-4
        assert torch.isfinite(ends[-1]).all()
    # most compute their norms in float32, whatever the weights are; some sum their gradients in it too
    assert (ends[-1] - ends[0]).abs().max() <= (1e-6 if rounds else 1e-7 if name in FLOAT32_INSIDE else 1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_longer_fit_ends_with_the_same_weights(make_module, fit, weights, checkpointing):
    ends = []
    for padding_free in (False, True):
        settings = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_tokens=40)
        module = make_module(
            rollout=settings, optimizer=sgd, padding_free=padding_free, gradient_checkpointing=checkpointing
        )
        fit(module, max_steps=8, accumulate_grad_batches=4, precision="64-true")  # which amplifies nothing
        ends.append(weights(module))
    assert ends[0].dtype == torch.float64
    assert (ends[1] - ends[0]).abs().max() <= 1e-8  # the norms are float32's


def test_a_token_limit_counts_what_is_there(make_module, fit):
    """Micro-batches that are over a limit with padding, and within it without."""
    over = {}
    for padding_free in (False, True):
        settings = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=8, micro_batch_tokens=155)
        module = make_module(
            rollout=settings, generation=GenerationSettings(max_new_tokens=12), padding_free=padding_free
        )
        fit(module, max_steps=1, accumulate_grad_batches=3)
        batch, (update,) = module.rollout.batch, module.updates
        real = (batch.prompt_mask.sum(dim=1) + batch.lengths).tolist()
        padded = [module.rollout.micro_batch(rows, torch.device("cpu")) for rows in update.micro_batches]
        shown = [sum(real[row] for row in rows) for rows in update.micro_batches]
        if not padding_free:
            shown = [len(part) * (part.prompt_ids.shape[1] + part.completion_ids.shape[1]) for part in padded]
        over[padding_free] = max(shown) > 155
        assert update.over_limit == over[padding_free]
    assert over == {False: True, True: False}


def test_the_square_mask_is_spoken_of(make_module, fit, caplog):
    with caplog.at_level("INFO"):
        fit(make_module(), max_steps=1)
        assert "mask of all pairs" not in caplog.text
        fit(make_module(padding_free=True), max_steps=1)
    assert "padding_free=True under 'sdpa' attention makes a mask of all pairs" in caplog.text


def test_models_that_mix_sequences_up_are_refused_before_anything_is_sampled(build, make_module, fit, tmp_path):
    asked = []
    policy = build("opt")
    module = make_module(policy=policy, padding_free=True, reward=lambda prompts, completions, **_: asked.append(1))
    with pytest.raises(ValueError, match=r"OPTForCausalLM .*set padding_free=False"):
        fit(module)
    build("opt").save_pretrained(tmp_path / "other")
    module = make_module(padding_free=True, reference=ReferenceSettings("frozen", model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"OPTForCausalLM .*set padding_free=False"):
        fit(module)
    assert not asked
