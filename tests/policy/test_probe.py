"""The start-up probe: what it refuses, by name and with the cause; what it passes; and that it leaves no trace."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gvpo_lightning import GenerationSettings, ReferenceSettings, RolloutSettings
from gvpo_lightning.policy.head import Scoring
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.prepare import load_policy, prepare_policy
from gvpo_lightning.policy.probe import probe_policy
from gvpo_lightning.rollout.generate import generate_completions
from gvpo_lightning.sources.settings import FileSettings, SourceSettings
from tests.policy.architectures import config_of
from tests.policy.conftest import ARCHITECTURES, SIZES

SAMPLED = {"gathered": contextlib.nullcontext()}


def built(kind, dtype=torch.float32, **settings):
    """A tiny random Qwen2 of the given class, ready to train."""
    torch.manual_seed(0)
    model = kind(Qwen2Config(**(SIZES | settings))).to(dtype)
    prepare_policy(model)
    return model


class Changed(Qwen2ForCausalLM):
    """A Qwen2 that changes the embeddings which it is called with."""

    def forward(self, input_ids=None, attention_mask=None, **inputs):
        embeddings = self.get_input_embeddings()(input_ids)
        return super().forward(
            inputs_embeds=self.change(embeddings, attention_mask), attention_mask=attention_mask, **inputs
        )


class Noisy(Changed):
    """Its noise has a name that says nothing."""

    epsilon = 0.005

    def change(self, embeddings, mask):
        return embeddings * (1 + self.epsilon * torch.rand_like(embeddings)) if self.training else embeddings


class NoisyByNumpy(Changed):
    def change(self, embeddings, mask):
        return embeddings * (1 + 0.02 * np.random.rand()) if self.training else embeddings


class Scaled(Changed):
    def change(self, embeddings, mask):
        return embeddings * (1.5 if self.training else 1.0)


class GradientOverflows(Changed):
    """Its embeddings are what they were, and the gradient of its smallest weight is beyond float16."""

    def change(self, embeddings, mask):
        bias = self.model.layers[0].self_attn.k_proj.bias
        return embeddings + (bias - bias.detach()).sum() * 6e4 * 6e4


class MixesRows(Changed):
    def change(self, embeddings, mask):
        return embeddings + embeddings.mean(dim=(0, 1)) * (len(embeddings) > 1)


class ReadsPadding(Changed):
    """Every token sees a little of the one before, whatever that is."""

    def change(self, embeddings, mask):
        return embeddings + 0.3 * embeddings.roll(1, dims=1) * (torch.arange(embeddings.shape[1]) > 0)[:, None]


class IgnoresTheMask(Qwen2ForCausalLM):
    def forward(self, *args, attention_mask=None, position_ids=None, **inputs):
        return super().forward(*args, **inputs)


class LosesItsCache(Qwen2ForCausalLM):
    """Each token that is sampled sees itself alone."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **inputs):
        if input_ids.shape[1] == 1 and past_key_values is not None:
            past_key_values, attention_mask = None, None
        return super().forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **inputs)


class TakesNoPadding(Qwen2ForCausalLM):
    def forward(self, *args, attention_mask=None, **inputs):
        if attention_mask is not None and not attention_mask.all():
            raise NotImplementedError("rows must be full")
        return super().forward(*args, attention_mask=attention_mask, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Noisy, "in two passes over the same tokens, .* it is random, by noise under a name that is not known here"),
        (NoisyByNumpy, "in two passes over the same tokens, .* it is random"),
        (Scaled, "in training mode and in evaluation mode differ .* switch that off in the model's config"),
        (MixesRows, "alone and beside a longer row differ .* take a model that keeps rows apart"),
        (ReadsPadding, "behind one and another padding, differ .* it reads padding"),
        (IgnoresTheMask, "alone and padded on the left differ .* it ignores the attention mask"),
        (LosesItsCache, "step by step through its key-value cache, .* its cache or its generation loses"),
        (TakesNoPadding, "it has failed on a few tokens with NotImplementedError: rows must be full Take another"),
    ],
)
def test_a_model_whose_logprobs_depend_on_their_company_is_refused(kind, cause, dtype):
    model = built(kind, dtype)
    with pytest.raises(ValueError, match=f"{kind.__name__} can be neither trained nor a reference: .*{cause}"):
        probe_policy(model, **SAMPLED)
    if kind is LosesItsCache:
        probe_policy(model)  # what is not sampled from needs no cache


def test_a_run_is_refused_before_anything_is_sampled(make_module, fit, tokenizer):
    torch.manual_seed(0)
    policy = Noisy(Qwen2Config(**(SIZES | {"vocab_size": len(tokenizer)})))
    sampled = []
    module = make_module(policy=policy, reward=lambda p, c, **_: sampled.append(1) or [0.0] * len(p))
    with pytest.raises(ValueError, match=r"Noisy can be neither trained nor a reference: .* it is random"):
        fit(module)
    assert not sampled


def test_a_gradient_that_padding_makes_infinite_is_refused():
    """The embedding of a padding token starts as 0, and Gemma 3n divides by its norm."""
    torch.manual_seed(0)
    config = config_of("gemma3n_text", 23)
    config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config)
    prepare_policy(model)
    with pytest.raises(
        ValueError,
        match="Gemma3nForCausalLM can be neither trained nor a reference: where rows are padded its gradient is not",
    ):
        probe_policy(model, **SAMPLED)
    model.get_input_embeddings().weight.data[0] = 0.1
    probe_policy(model, **SAMPLED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_healthy_model_passes(build_model, name, dtype):
    if (name, dtype) == ("gemma2-softcap", torch.float64):
        pytest.skip("its attention is not one in float64")
    model = build_model(name).to(dtype)
    prepare_policy(model)
    is_packable = name not in ("opt", "falcon")
    probe_policy(model, Scoring(0.7, padding_free=is_packable), **SAMPLED)


@pytest.mark.parametrize("seed", [10, 11])
def test_log_ratios_that_about_cancel_are_not_refused_in_16_bits(seed):
    """Of the first model's two rows they do: its loss, a difference of sums, is off by more than the log-probs are."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model.lm_head.weight.data *= 4
    model.bfloat16()
    prepare_policy(model)
    assert probe_policy(model, **SAMPLED) < 0.02


def test_what_overflows_float16_is_told_from_what_the_model_does():
    model = built(Qwen2ForCausalLM, torch.float16)
    model.lm_head.weight.data *= 1e5
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM's own logits are not finite: .* use bfloat16 or float32"):
        probe_policy(model)
    model = built(GradientOverflows, torch.float16)
    with pytest.raises(ValueError, match=r"its gradient is not finite, with or without padding, .* use bfloat16"):
        probe_policy(model)


@pytest.mark.parametrize("seed", range(5))
def test_routers_that_flip_in_16_bits_are_not_refused(seed):
    torch.manual_seed(seed)
    config = config_of("qwen3_moe", 200)
    config.num_hidden_layers = 8
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    prepare_policy(model)
    probe_policy(model, **SAMPLED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_models_with_an_adapter_pass(build_model, tmp_path, quantization, dtype):
    pytest.importorskip("bitsandbytes")
    build_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    probe_policy(load_policy(str(tmp_path), LoadingSettings(quantization=quantization, dtype=dtype), lora), **SAMPLED)


def test_lora_and_checkpointing_pass(build_model):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "exclude_modules": ["lm_head"]}
    model = peft.get_peft_model(build_model("mistral-window"), peft.LoraConfig(**settings))
    prepare_policy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probe_policy(model, **SAMPLED)


@pytest.mark.parametrize("context", [4, 8, 9, 12, 13])
def test_no_row_is_longer_than_the_context(context):
    model = built(Qwen2ForCausalLM, max_position_embeddings=context)
    shapes = passes_of(model)
    probe_policy(model, **SAMPLED)
    assert max(length for _, length in shapes) <= max(context, 8)  # the head is checked on 8 tokens


def passes_of(model):
    """Fills with the shapes of the token ids in every forward pass of the decoder."""
    shapes = []
    model.model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("padding_free", [False, True])
def test_it_makes_as_many_passes_as_it_says(padding_free):
    model = built(Qwen2ForCausalLM)
    shapes = passes_of(model)
    probe_policy(model, Scoring(padding_free=padding_free))
    assert len(shapes) == 1 + 3 + 3 * padding_free + 7  # the logit map's, the head's, and the probe's
    shapes.clear()
    with torch.no_grad():
        probe_policy(model, Scoring(padding_free=padding_free), **SAMPLED)
    assert len(shapes) == 3 + 3 * padding_free + 6 + 1 + 4


def random_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, Noisy, NoisyByNumpy])
def test_it_leaves_no_trace(kind):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = built(kind, max_position_embeddings=24, rope_parameters=rope)
    model.model.layers[0].eval()
    model(torch.zeros((1, 40), dtype=torch.int64))  # the frequencies are now those of a long row
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotary = model.model.rotary_emb
    frequencies, reach = rotary.inv_freq.clone(), int(rotary.max_seq_len_cached)
    assert reach == 40
    modes, states = [module.training for module in model.modules()], random_states()
    with contextlib.nullcontext() if kind is Qwen2ForCausalLM else pytest.raises(ValueError, match="random"):
        probe_policy(model, **SAMPLED)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert torch.equal(rotary.inv_freq, frequencies)
    assert int(rotary.max_seq_len_cached) == reach


# -- noise of any name


def test_noise_of_every_name_is_switched_off():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    strengths = ("drop_path_rate", "layerdrop", "jitter_noise", "moe_jitter_eps", "noisy_std", "mask_time_prob")
    layer = model.model.layers[0]
    for name in strengths:
        setattr(layer, name, 0.1)
        setattr(model.config, name, 0.1)
    layer.noisy_gate, layer.drop_last_layer = True, True
    layer.stochastic_depth = torch.nn.Module()
    layer.mlp.norm_eps = 1e-6

    class GaussianNoise(torch.nn.Module):
        std, eps = None, None

    layer.noise = GaussianNoise()
    layer.noise.std, layer.noise.eps = 0.5, 1e-6
    prepare_policy(model)
    assert all(getattr(holder, name) == 0.0 for name in strengths for holder in (layer, model.config))
    assert layer.noisy_gate is False
    assert layer.drop_last_layer is True  # means something else
    assert layer.mlp.norm_eps == layer.noise.eps == 1e-6
    assert layer.noise.std == 0.0


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "minimax", "dbrx"])
def test_jitter_is_on_at_first_and_off_then(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, 23)).train()
    ids = torch.arange(1, 9)[None]  # the padding token's embedding is 0, and all experts alike to it
    assert not torch.equal(model(ids).logits, model(ids).logits)
    prepare_policy(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_jittered_mixtral_in_bfloat16_starts_at_a_log_ratio_of_zero(make_module, fit, tokenizer):
    torch.manual_seed(0)
    config = config_of("mixtral", len(tokenizer))
    config.router_jitter_noise = 0.005
    module = make_module(
        policy=AutoModelForCausalLM.from_config(config),
        rollout=RolloutSettings(group_size=4, prompts_per_rollout=4, prompts_per_update=4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    metrics = fit(module, max_steps=1, precision="bf16-true").callback_metrics
    assert float(metrics["log_ratio/policy/max"]) == 0.0  # the same rows, in the same shapes


# -- what the config says


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_routers_loss_is_refused_and_never_asked_for(make_module, fit, tokenizer, name):
    torch.manual_seed(0)
    config = config_of(name, len(tokenizer))
    config.output_router_logits = True
    policy = AutoModelForCausalLM.from_config(config)
    module = make_module(policy=policy)
    with pytest.raises(
        ValueError, match=r"output_router_logits=True, .* is not trained here: set output_router_logits to"
    ):
        fit(module)
    prepare_policy(policy)
    batch = generate_completions(policy, tokenizer, [[3, 4], [5]], 2, GenerationSettings(max_new_tokens=3), 0)
    assert len(batch) == 4
    assert policy.config.output_router_logits


def long_rope(kind, tokenizer, original, context):
    """A Phi-3 or Qwen2 whose positions change beyond `original` tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": context / original}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": original}
    settings = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": context, "rope_parameters": rope}
    name = "qwen2"
    if kind == "longrope":
        name, settings = "phi3", settings | {"original_max_position_embeddings": original}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))


@pytest.mark.parametrize("padding_free", [False, True])
def test_longrope_trains_up_to_its_original_length_alone(make_module, fit, tokenizer, padding_free):
    def start(original):
        module = make_module(
            policy=long_rope("longrope", tokenizer, original, 64),
            padding_free=padding_free,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        )
        return fit(module, rows=[{"prompt": "1" * length} for length in (2, 9)], max_steps=1)

    with pytest.raises(
        ValueError, match=r"Row 1: the prompt's 9 tokens .*=4 exceed .*rope_type='longrope' .* of 12: sh"
    ):
        start(12)
    assert float(start(13).callback_metrics["log_ratio/policy/max"]) < 1e-3


def test_recorded_completions_and_another_reference_have_the_same_limit(make_module, fit, tokenizer, tmp_path):
    rows, path = [{"prompt": "12"}], tmp_path / "recorded.jsonl"
    path.write_text(json.dumps(rows[0] | {"completions": ["1" * 10], "rewards": [1.0]}) + "\n")
    sources = SourceSettings(policy=0, file=FileSettings(str(path)))
    with pytest.raises(ValueError, match=r"Row 0: .* completion of 11 exceed .*'longrope' .* of 12: set rollout"):
        fit(make_module(policy=long_rope("longrope", tokenizer, 12, 64), sources=sources, reward=None), rows=rows)
    long_rope("longrope", tokenizer, 5, 64).save_pretrained(tmp_path / "other")
    module = make_module(reference=ReferenceSettings(model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"reference.model=.*: Row 0: the prompt's 2 .* exceed .*'longrope' .* of 5"):
        fit(module, rows=rows)


def test_another_reference_passes_the_same_probe(make_module, fit, tokenizer, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of("rwkv", len(tokenizer))).save_pretrained(tmp_path / "other")
    module = make_module(reference=ReferenceSettings(model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"RwkvForCausalLM can be neither trained nor a reference: .* on the left"):
        fit(module)


def test_dynamic_positions_train_up_to_the_context(make_module, fit, tokenizer):
    def start(context):
        module = make_module(
            policy=long_rope("dynamic", tokenizer, context / 4, context),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        )
        return fit(module, rows=[{"prompt": "1" * length} for length in (2, 9)], max_steps=1)

    with pytest.raises(ValueError, match=r"exceed .* of 12"):
        start(12)
    assert float(start(13).callback_metrics["log_ratio/policy/max"]) < 1e-3


def test_a_mixtral_with_router_logits_is_the_one_that_crashed():
    """What generation would do with them, so that the test above can fail."""
    config = config_of("mixtral", 23)
    config.output_router_logits = True
    with pytest.raises(RuntimeError):
        MixtralForCausalLM(config).eval().generate(
            torch.tensor([[0, 3, 4], [3, 4, 5]]), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), max_new_tokens=3
        )
