"""The estimate that a run prints is of its own settings."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2ForSequenceClassification

from gvpo_lightning import GenerationSettings, LoadingSettings, RolloutSettings
from gvpo_lightning.callbacks import MemoryEstimate
from gvpo_lightning.estimate import estimate_memory
from gvpo_lightning.rewards import RewardModel
from gvpo_lightning.rollout.collect import Collector

GENERATION = GenerationSettings(max_new_tokens=4, batch_size=16)


@pytest.fixture
def facts_of(make_module, fit):
    """The sizes and facts of a short run: `facts_of(trainer_arguments, **module_settings)`."""

    def read(trainer_arguments=None, **settings):
        module = make_module(generation=GENERATION, **settings)
        estimate = MemoryEstimate()
        arguments = {"max_steps": 4, "accumulate_grad_batches": 2, "callbacks": [estimate]}
        fit(module, **(arguments | (trainer_arguments or {})))
        return estimate.sizes, estimate.facts

    return read


def test_facts_are_the_runs_own(facts_of):
    rollout = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, epochs_per_rollout=2)
    sizes, facts = facts_of(rollout=rollout, reference="previous")
    work = facts.workload
    assert (work.prompt_tokens, work.completion_tokens) == (5, 4)  # "10+3=" and max_new_tokens
    assert (work.group_size, work.updates_per_rollout, work.accumulate, work.generation_batch) == (4, 4, 2, 16)
    assert (facts.num_gpus, facts.strategy, facts.micro_batch, facts.two_passes) == (1, "ddp", 8, False)
    assert (facts.weight_bytes, facts.compute_bytes, facts.optimizer_bytes) == (4, 4, 8)
    assert (facts.trained_parameters, facts.reference, facts.checkpointing, facts.cuda) == (
        None,
        "previous",
        False,
        False,
    )
    assert sizes.num_layers == 2


def test_passes_are_those_of_the_objective(facts_of):
    found = {}
    for objective in ("gvpo", "grpo", "dpo", "sft"):
        _, facts = facts_of({"accumulate_grad_batches": 4}, objective=objective, rollout=RolloutSettings(8, 4, 1))
        found[objective] = (facts.two_passes, facts.num_scorings)
    assert found == {"gvpo": (True, 1), "grpo": (False, 2), "dpo": (True, 1), "sft": (False, 1)}


def test_precision_optimizer_adapters_and_checkpointing_are_seen(facts_of, tiny_policy):
    peft = pytest.importorskip("peft")
    policy = tiny_policy()
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0))
    sizes, facts = facts_of(
        {"precision": "bf16-mixed"},
        policy=policy,
        reference="adapter_off",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert facts.trained_parameters == trained
    assert sizes.parameters == sum(p.numel() for p in policy.parameters())
    assert (facts.compute_bytes, facts.optimizer_bytes, facts.checkpointing) == (2, 4, True)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_from_the_settings_is_seen_and_no_copy_for_its_reference(
    facts_of, tiny_policy, tokenizer, tmp_path, quantization
):
    pytest.importorskip("peft")
    if quantization:
        pytest.importorskip("bitsandbytes")
    policy = tiny_policy(hidden_size=256)
    policy.save_pretrained(tmp_path / "base")
    sizes, facts = facts_of(
        {},
        policy=str(tmp_path / "base"),
        tokenizer=tokenizer,
        loading=LoadingSettings("bfloat16", quantization=quantization),
        lora={"r": 2, "target_modules": "all-linear"},
    )
    whole = sum(p.numel() for p in policy.parameters())
    assert facts.trained_parameters == sizes.parameters - whole
    assert (facts.weight_bytes, facts.trained_bytes, facts.optimizer_bytes) == (2, 4, 8)
    assert (facts.reference, facts.reference_parameters) == ("adapter_off", 0)
    assert facts.layer_bytes == (None if quantization is None else pytest.approx(0.6, abs=0.1))  # norms are bfloat16


def test_a_reward_model_beside_the_policy_is_counted(facts_of, tmp_path, tiny_policy, tokenizer):
    config = tiny_policy().config
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path))
    sizes, facts = facts_of(reward=reward)
    assert facts.reward_bytes == 2 * sum(p.numel() for p in reward._model.parameters())
    without = estimate_memory(sizes, replace(facts, reward_bytes=0))
    assert estimate_memory(sizes, facts).peak == without.peak + facts.reward_bytes


def test_the_longest_prompt_is_of_them_all(make_module, fit):
    prompts = [{"prompt": "1+1="}] * 200 + [{"prompt": "1+1+1+1+1+1="}]
    module = make_module(generation=GENERATION)
    fit(module, rows=prompts, max_steps=2, callbacks=[estimate := MemoryEstimate()])
    assert estimate.facts.workload.prompt_tokens == 12


def test_it_is_short_and_says_the_peak(make_module, fit, capsys):
    fit(make_module(), callbacks=[MemoryEstimate()], max_steps=2)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Estimated peak on one device: "))
    end = next(number for number, line in enumerate(lines) if line.startswith("In a machine's own memory: reference"))
    assert end - start < 10
    assert lines[start + 1].split("  ")[-1].strip() == "update"
    assert {"parameters", "gradients", "optimizer", "activations"} <= {line.split()[0] for line in lines[start:end]}


def test_an_unknown_kind_of_policy_is_trained_all_the_same(make_module, fit, capsys, monkeypatch):
    def refuse(config, loading):
        raise ValueError("no list of decoder layers")

    monkeypatch.setattr("gvpo_lightning.callbacks.estimate.model_sizes", refuse)
    assert fit(make_module(), callbacks=[MemoryEstimate()], max_steps=2).global_step == 2
    assert "No estimate of memory: no list of decoder layers" in capsys.readouterr().out


def test_no_gradients_are_kept_during_rollouts(make_module, fit, monkeypatch):
    """Why the rollout phase does not count them."""
    module, seen = make_module(), []
    original = Collector.collect

    def collect(collector, policy, *arguments):
        seen.append(any(p.grad is not None for p in policy.parameters()))
        return original(collector, policy, *arguments)

    monkeypatch.setattr(Collector, "collect", collect)
    fit(module, max_steps=6)
    assert seen == [False, False, False]
