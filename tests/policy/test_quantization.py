"""QLoRA on a CPU: the adapter's gradients are those over the dequantized weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo_lightning.policy.head import completion_loss
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.lora import is_adapted
from gvpo_lightning.policy.prepare import load_policy

bitsandbytes = pytest.importorskip("bitsandbytes")
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return str(tmp_path)


def dequantized(layer):
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scale[:, None] / 127


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [("nf4", 1e-4), ("int8", 0.02)],  # int8 rounds what it multiplies to 16 bits
)
def test_two_steps_are_those_over_the_dequantized_weights(folder, ragged, quantization, tolerance):
    ragged.rewards = torch.tensor([1.0, 0.0, 0.5, torch.nan])
    ragged.reference_logprobs = -3.0 * ragged.completion_mask
    quantized = load_policy(folder, LoadingSettings(quantization=quantization), LORA, seed=1)
    plain = load_policy(folder, LoadingSettings(), LORA, seed=1)
    layers, changed = dict(plain.named_modules()), 0.0
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
                changed = max(changed, float((layers[name].weight - dequantized(layer)).abs().max()))
                layers[name].weight.copy_(dequantized(layer))
    assert is_adapted(quantized)
    assert changed > 1e-3  # what was quantized is not what it was
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    for _ in range(2):
        for model in (quantized, plain):
            model.zero_grad()
            completion_loss(model, ragged, beta=0.5).loss.backward()
        ours, theirs = dict(quantized.named_parameters()), dict(plain.named_parameters())
        assert {n for n, p in quantized.named_parameters() if p.grad is not None} == set(names)
        error = sum(float((ours[n].grad - theirs[n].grad).square().sum()) for n in names)
        scale = sum(float(theirs[n].grad.square().sum()) for n in names)
        assert (error / scale) ** 0.5 < tolerance
        with torch.no_grad():
            for model in (ours, theirs):
                for name in names:
                    model[name] -= 0.1 * model[name].grad
