import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gvpo_lightning.data.batch import CompletionBatch, collate_completions

SIZES = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # logits of a few units: at the default 0.02 every distribution is nearly uniform
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ARCHITECTURES = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "phi3": {"model_type": "phi3"},
    "phi-head-bias": {"model_type": "phi"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "falcon": {"model_type": "falcon"},
    "opt": {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    # these change their logits after the head; strongly, so that it shows
    "gemma2-softcap": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
    "gemma3-softcap": {"model_type": "gemma3_text", "head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere-scaled": {"model_type": "cohere", "logit_scale": 0.3},
    "cohere2-scaled": {"model_type": "cohere2", "logit_scale": 0.3},
    "granite-scaled": {"model_type": "granite", "logits_scaling": 6.0},
    "granite-tied": {"model_type": "granite", "logits_scaling": 6.0, "tie_word_embeddings": True},
    "hyperclovax-scaled": {"model_type": "hyperclovax", "logits_scaling": 0.5},  # multiplied, where Granite divides
}
# eager attention, Gemma 2's, gives NaN where rows are padded in float64: transformers' softmax is in float32 there
FLOAT32_ALONE = ["gemma2-softcap"]
FLOAT32_INSIDE = [
    "gemma3",
    "gemma3-softcap",
    "cohere-scaled",
    "cohere2-scaled",
]  # their norms, whatever the weights are
CHANGED = [name for name in ARCHITECTURES if name.endswith(("-softcap", "-scaled"))] + ["granite-tied"]


@pytest.fixture
def build_model():
    """Builds a tiny random model of one of `ARCHITECTURES`; keyword arguments go to its config."""

    def build(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
        torch.manual_seed(seed)
        settings = SIZES | ARCHITECTURES[name] | overrides
        if name == "gpt2":
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
                settings.pop(key)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        head = model.get_output_embeddings()
        if head.bias is not None:
            torch.nn.init.normal_(head.bias)  # zero at first: a forgotten bias would go unseen
        return model

    return build


@pytest.fixture
def ragged() -> CompletionBatch:
    """Four completions of prompts of lengths 1 to 5, one of them dropped; token 1 ends a completion."""
    batch = collate_completions(
        [[4, 9, 2, 7, 5], [3], [11, 12], [6, 8, 10]],
        [[5, 1], [9, 3, 17, 2, 22], [14, 15, 1], [20, 1]],
        [False, True, False, False],
        [0, 0, 1, 1],
        pad_token_id=0,
    )
    batch.drop(torch.tensor([False, False, False, True]))
    return batch
