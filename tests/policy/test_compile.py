"""`torch_compile`: the decoder layers run compiled, and nothing else changes.

By the `aot_eager` backend, which traces, differentiates and guards as the default one does but generates no code;
that one is run by a slow test.
"""

import random
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from gvpo_lightning import GenerationSettings, RolloutSettings
from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.objectives.gvpo import gvpo_loss
from gvpo_lightning.policy.head import completion_logprobs, completion_loss
from gvpo_lightning.policy.prepare import prepare_policy
from gvpo_lightning.policy.source import compile_layers
from gvpo_lightning.rollout.generate import generate_completions
from tests.error_budget import assert_within, sum_budget
from tests.update_budget import gradient_size, loss_sizes, own_logits


@pytest.fixture
def backend():
    """Sets the backend of torch.compile; compiled code is forgotten before and after."""
    before = torch.compiler.get_default_backend()
    limit = torch._dynamo.config.recompile_limit

    def start(name):
        torch.compiler.set_default_backend(name)
        torch.compiler.reset()
        counters.clear()

    yield start
    start(before)
    torch._dynamo.config.recompile_limit = limit


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def settings():
    """Groups are cut, micro-batches are ragged, and some are of one completion."""
    return {
        "rollout": RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=3),
        "generation": GenerationSettings(max_new_tokens=6),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }


@pytest.mark.parametrize("name", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_are_eagers_and_no_length_is_compiled_again(tiny_policy, backend, name):
    if name == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    draw = random.Random(0)

    def ragged_batch(size):
        prompts, completions = (
            [[draw.randint(2, 12) for _ in range(draw.randint(1, longest))] for _ in range(size)] for longest in (9, 12)
        )
        batch = collate_completions(prompts, completions, [False] * size, [n // 2 for n in range(size)], 0)
        batch.rewards = torch.tensor([draw.random() for _ in range(size)])
        return batch

    def gradient(policy, batch):
        policy.zero_grad()
        completion_loss(policy, batch, 0.3).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    def loss_of(logprobs, batch):
        columns = (batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids)
        return gvpo_loss(logprobs, *columns, 0.3).loss

    def budget(policy, batch):
        logprobs, _ = completion_logprobs(policy, batch)
        sizes = loss_sizes(loss_of, logprobs, batch, own_logits(policy, batch))
        return sum_budget(gradient_size(logprobs, sizes.coefficient_sizes, list(policy.parameters())))

    backend(name)
    eager, compiled = tiny_policy(num_hidden_layers=3), tiny_policy(num_hidden_layers=3)
    prepare_policy(eager)
    prepare_policy(compiled)
    compile_layers(compiled)
    compile_layers(compiled)  # does nothing
    for size in (4, 2, 3, 8, 5, 2, 6, 7):
        batch = ragged_batch(size)
        expected = gradient(eager, batch)
        assert_within(gradient(compiled, batch), expected, budget(eager, batch))
        assert expected.abs().max() > 1e3 * budget(eager, batch)  # or a wrong one could pass
    assert graphs() == 1  # for all layers and sizes
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing and padding-free"])
def test_a_fit_ends_with_the_same_weights_and_stops_compiling(
    make_module, tiny_policy, fit, prompts, weights, backend, settings, checkpointing, tmp_path
):
    settings |= {"gradient_checkpointing": checkpointing, "padding_free": checkpointing}
    arguments = {"accumulate_grad_batches": 6, "max_steps": 12, "val_check_interval": 24, "rows": prompts}
    arguments["precision"] = "64-true"  # all but the norms
    validation = DataLoader(prompts[:5], batch_size=2, collate_fn=list)
    eager = make_module(policy=tiny_policy(num_hidden_layers=3), **settings)
    fit(eager, **arguments)
    assert (weights(eager) - weights(make_module(policy=tiny_policy(num_hidden_layers=3)))).abs().max() > 1e-3

    backend("aot_eager")
    module = make_module(policy=tiny_policy(num_hidden_layers=3), torch_compile=True, **settings)
    fit(module, **arguments)
    assert (weights(module) - weights(eager)).abs().max() <= 1e-8
    assert 2 <= graphs() <= 16  # for three layers, two passes and scoring, with and without mask, of one and of many
    assert not counters["graph_break"]
    assert list(module.policy.state_dict()) == list(eager.policy.state_dict())

    compiled = graphs()
    module.trainer.validate(module, validation, verbose=False)
    fit(module, **arguments)  # other samples, other lengths
    assert graphs() <= compiled + 2
    module.export(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in module.policy.state_dict().items())


def test_sampling_is_not_compiled(tiny_policy, tokenizer, backend):
    backend("aot_eager")
    policy = tiny_policy()
    arguments = (tokenizer, [[3, 4], [5]], 4, GenerationSettings(max_new_tokens=8), 0)
    before = generate_completions(policy, *arguments)
    compile_layers(policy)
    after = generate_completions(policy, *arguments)
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert graphs() == 0


def test_a_model_without_decoder_layers_is_refused(tiny_policy, make_module, fit):
    policy = tiny_policy()
    policy._no_split_modules = None
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM does not say which .*: set torch_compile=False"):
        fit(make_module(policy=policy, torch_compile=True))
