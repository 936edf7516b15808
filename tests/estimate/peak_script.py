"""The most resident memory that a micro-batch's forward and backward pass takes beside the parameters, in bytes.

Run by test_peak, in a process of its own; prints one number for each mode.
"""

import json

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.memory import peak_bytes
from benchmarks.train_step_paths import make_batch, with_adapters
from gvpo_lightning.policy.head import completion_loss
from gvpo_lightning.policy.prepare import prepare_policy

CONFIG = Qwen2Config(
    vocab_size=4_000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
PROMPT, COMPLETION = 56, 224  # all completions as long, so that nothing is padded


MODES = ("all trained", "layers again", "LoRA", "LoRA, bfloat16 beneath")


def measure(mode: str) -> int:
    model = Qwen2ForCausalLM(CONFIG)
    prepare_policy(model)
    if mode == "layers again":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if mode == "LoRA, bfloat16 beneath":
        model = model.bfloat16()
    if mode.startswith("LoRA"):
        model = with_adapters(model)
    warm_up = make_batch(8, (8, 8), CONFIG.vocab_size, "cpu")
    completion_loss(model, warm_up, 0.1).loss.backward()
    model.zero_grad()
    batch = make_batch(8, (COMPLETION, COMPLETION), CONFIG.vocab_size, "cpu")
    assert batch.prompt_ids.shape[1] == PROMPT
    before, peak = peak_bytes(lambda: completion_loss(model, batch, 0.1).loss.backward(), "cpu")
    return peak - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({mode: measure(mode) for mode in MODES}))
