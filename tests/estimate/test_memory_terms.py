"""The estimator's bytes against those of real tensors, on a CPU."""

import pytest
import torch

from benchmarks.train_step_paths import make_batch
from gvpo_lightning.estimate import RunFacts, Workload, estimate_memory, model_sizes
from gvpo_lightning.estimate.facts import count_parameters, quantized_layer_bytes, with_adapters
from gvpo_lightning.estimate.memory import head_bytes
from gvpo_lightning.policy.head import completion_loss
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.prepare import load_policy, prepare_policy
from gvpo_lightning.reference.kinds import WeightsReference
from gvpo_lightning.reference.settings import ReferenceSettings

VOCABULARY = 700
PLAIN = {"compute_bytes": 4, "cuda": False}


@pytest.fixture
def build(tiny_policy):
    """A policy of a few layers: `build(lora=False, checkpointing=False, **config)`."""

    def make(lora=False, checkpointing=False, dtype=torch.float32, **overrides):
        settings = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
        model = tiny_policy(**(settings | {"max_position_embeddings": 512} | overrides)).to(dtype)
        prepare_policy(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
        return model

    return make


def facts_and_sizes(model, **facts):
    """A run's facts for a micro-batch of 8 completions of 64 to 96 tokens after prompts of 16, and its sizes."""
    sizes, trained = model_sizes(model.config), count_parameters(model, trained=True)
    if hasattr(model, "peft_config"):
        sizes = with_adapters(sizes, trained)
        facts["trained_parameters"] = trained
    work = Workload(16, 96, prompts_per_rollout=1, prompts_per_update=1, generates=False)
    return RunFacts(work, **(PLAIN | facts)), sizes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_held_bytes_are_those_of_the_real_tensors(build, lora, tied, optimizer):
    model = build(lora, tie_word_embeddings=tied)
    if lora:
        pytest.importorskip("peft")
    trained = [p for p in model.parameters() if p.requires_grad]
    make = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    update = make(trained, lr=1e-3)
    completion_loss(model, make_batch(8, (64, 96), VOCABULARY, "cpu"), 0.1).loss.backward()
    update.step()
    reference = WeightsReference(ReferenceSettings(), can_be_reloaded=True)
    reference.prepare(model, placement=None)  # at which this one does not look
    facts, sizes = facts_and_sizes(model, optimizer_bytes=8 if optimizer == "adamw" else 0)
    memory = estimate_memory(sizes, facts)
    states = [s for state in update.state.values() for s in state.values() if torch.is_tensor(s) and s.ndim]
    measured = {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained),
        "optimizer": sum(s.nbytes for s in states),
    }
    assert {name: memory.phases["update"][name] for name in measured} == measured
    assert memory.host["reference"] == sum(w.nbytes for w in reference.weights.values())


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_held_bytes_of_a_16_bit_or_quantized_model_beneath_a_float32_adapter(build, tmp_path, quantization):
    pytest.importorskip("peft")
    if quantization:
        pytest.importorskip("bitsandbytes")
    build(hidden_size=256, intermediate_size=704).save_pretrained(tmp_path)
    loading = LoadingSettings("bfloat16", quantization=quantization)
    model = load_policy(str(tmp_path), loading, {"r": 4, "target_modules": "all-linear"})
    trained = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.AdamW(trained, lr=1e-3)
    completion_loss(model, make_batch(8, (64, 96), VOCABULARY, "cpu"), 0.1).loss.backward()
    update.step()
    whole = model_sizes(model.config)
    sizes = with_adapters(whole, sum(p.numel() for p in trained))
    facts = RunFacts(
        Workload(16, 96, prompts_per_rollout=1, prompts_per_update=1, generates=False),
        weight_bytes=2,
        compute_bytes=2,
        trained_parameters=sum(p.numel() for p in trained),
        trained_bytes=4,
        # 4 bits and, for 64 of them, a scale of 8 bits, whose own scales are float32 for 256; or a scale a row
        layer_bytes={None: None, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.01}[quantization],
        reference="adapter_off",
        cuda=False,
    )
    memory = estimate_memory(sizes, facts)
    states = [s for state in update.state.values() for s in state.values() if torch.is_tensor(s) and s.ndim]
    assert memory.phases["update"]["gradients"] == sum(p.grad.nbytes for p in trained)
    assert memory.phases["update"]["optimizer"] == sum(s.nbytes for s in states)
    tensors = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    assert memory.phases["update"]["parameters"] == pytest.approx(sum(tensors.values()), rel=0.02)
    if quantization:
        assert quantized_layer_bytes(model, whole) == pytest.approx(facts.layer_bytes, rel=0.03)
    assert "reference" not in memory.host


def saved_bytes(model, batch, autocast):
    """What autograd keeps of a forward pass beside the parameters: each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        completion_loss(model, batch, 0.1)
    return sum(nbytes for nbytes, _ in storages.values())


CASES = {
    "float32": ({}, {}),
    "float32, checkpointing": ({"checkpointing": True}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {"weight_bytes": 2, "compute_bytes": 2}),
    "autocast": ({}, {"compute_bytes": 2}),
    "LoRA": ({"lora": True}, {}),
    "LoRA, bfloat16 beneath": (
        {"lora": True, "dtype": torch.bfloat16},
        {"weight_bytes": 2, "compute_bytes": 2, "trained_bytes": 4},
    ),
    "LoRA, checkpointing": ({"lora": True, "checkpointing": True}, {}),
    "all heads of their own": ({"num_key_value_heads": 4, "num_hidden_layers": 6}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_and_head_are_what_autograd_saves(build, case, record_property):
    settings, facts = CASES[case]
    if "lora" in settings:
        pytest.importorskip("peft")
    model = build(**settings)
    measured = saved_bytes(model, make_batch(8, (64, 96), VOCABULARY, "cpu"), case == "autocast")
    facts, sizes = facts_and_sizes(model, checkpointing=settings.get("checkpointing", False), **facts)
    forward = estimate_memory(sizes, facts).phases["forward"]
    # autograd holds the casts of weights too; without autocast there are none
    estimated = forward["whole weights"] + forward["activations"] + head_bytes(sizes, facts)[0]
    record_property("estimated over measured", round(estimated / measured, 3))
    print(case, estimated / measured)
    assert estimated == pytest.approx(measured, rel=0.2)
