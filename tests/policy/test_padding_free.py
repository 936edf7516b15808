"""One row of sequences end to end gives what padded rows give; models that mix its sequences up are refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_lightning.objectives.gvpo import gvpo_loss
from gvpo_lightning.policy.head import Scoring, completion_logprobs, completion_loss, score
from gvpo_lightning.policy.head_check import attention_of, check_logprob_head
from gvpo_lightning.policy.prepare import prepare_policy
from tests.error_budget import assert_within, sum_budget
from tests.policy.conftest import FLOAT32_ALONE, FLOAT32_INSIDE, SIZES
from tests.update_budget import gradient_size, loss_sizes, own_logits, scores_budget

PACKABLE = [
    "qwen2",
    "qwen2-tied",
    "llama",
    "mistral-window",
    "qwen3",
    "phi3",
    "phi-head-bias",
    "gpt2",
    "gemma3",
    "gemma2-softcap",
    "granite-scaled",
    "cohere-scaled",
    "cohere2-scaled",
]


@pytest.fixture
def batch(ragged):
    ragged.rewards = torch.tensor([1.0, 0.0, 0.5, torch.nan])
    ragged.reference_logprobs = -3 * torch.rand(ragged.completion_mask.shape)
    return ragged


def loss_of(logprobs, batch):
    columns = (batch.reference_logprobs, batch.completion_mask, batch.rewards, batch.group_ids)
    return gvpo_loss(logprobs, *columns, 0.3).loss


def gradients(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKABLE)
def test_it_equals_padded_rows(build_model, batch, name, attention, checkpointing):
    if attention == "sdpa" and name == "gemma2-softcap":
        pytest.skip("it has no sdpa")
    # eager attention can't do padded rows in float64
    dtype = torch.float32 if attention == "eager" or name in FLOAT32_ALONE else torch.float64
    model = build_model(name, attn_implementation=attention).to(dtype)
    assert attention_of(model) == attention
    prepare_policy(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    padded, packed = (
        completion_logprobs(model, batch, Scoring(0.8, padding_free=free), return_entropy=True)
        for free in (False, True)
    )
    rounded = torch.float32 if name in FLOAT32_INSIDE else dtype
    budget = scores_budget(model, batch, rounded) / 0.8
    for ours, theirs in zip(packed, padded, strict=True):
        assert_within(ours, theirs, budget)
    losses = [completion_loss(model, batch, 0.3, Scoring(padding_free=free)).loss for free in (False, True)]
    logprobs, _ = completion_logprobs(model, batch)
    sizes = loss_sizes(loss_of, logprobs, batch, own_logits(model, batch))
    assert_within(losses[1], losses[0], sum_budget(sizes.loss_size, rounded))
    theirs, ours = (gradients(model, loss) for loss in losses)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = gradient_size(logprobs, sizes.coefficient_sizes, parameters)
    assert_within(ours, theirs, sum_budget(size, rounded))
    assert theirs.abs().max() > 1e-3 * size  # or a wrong one could pass
    assert check_logprob_head(model, Scoring(padding_free=True)) < 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scoring_takes_the_same_path(build_model, batch, batch_size):
    model = build_model("qwen2").double()
    prepare_policy(model)
    shapes = []
    model.register_forward_pre_hook(lambda _, a, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    packed = score(model, batch, Scoring(0.7, padding_free=True), batch_size=batch_size)
    assert {rows for rows, _ in shapes} == {1}
    torch.testing.assert_close(packed, score(model, batch, Scoring(0.7), batch_size=batch_size))


def test_the_model_sees_neither_padding_nor_a_mask(build_model, batch):
    model = build_model("qwen2")
    prepare_policy(model)
    completion_logprobs(model, batch)
    seen = {}
    model.register_forward_pre_hook(lambda _, arguments, inputs: seen.update(inputs), with_kwargs=True)
    completion_logprobs(model, batch, Scoring(padding_free=True))
    assert seen["input_ids"].tolist() == [[4, 9, 2, 7, 5, 5, 1, 3, 9, 3, 17, 2, 22, 11, 12, 14, 15, 1, 6, 8, 10]]
    assert seen["position_ids"].tolist() == [[*range(7), *range(6), *range(5), *range(3)]]
    assert "attention_mask" not in seen


def test_everything_dropped_still_makes_a_backward_pass(build_model, batch):
    model = build_model("qwen2")
    prepare_policy(model)
    batch.drop(torch.ones(4, dtype=torch.bool))
    loss = completion_loss(model, batch, 0.3, Scoring(padding_free=True)).loss
    loss.backward()
    assert float(loss.detach()) == 0


# recurrent, convolutional, hybrid; positions by ALiBi; masks that transformers makes without position ids
MIXING = {
    "mamba": {"model_type": "mamba"},
    "jamba": {"model_type": "jamba"},
    "recurrent_gemma": {"model_type": "recurrent_gemma"},
    "bloom": {"model_type": "bloom"},
    "opt": {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_sequences_up_is_refused(name, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(SIZES | MIXING[name]))).to(dtype)
    prepare_policy(model)
    check_logprob_head(model)
    with pytest.raises(ValueError, match=r"keeps the sequences of one row apart .*: set padding_free=False"):
        check_logprob_head(model, Scoring(padding_free=True))


@pytest.mark.parametrize("name", ["qwen2", "mistral-window", "gpt2", "granite-scaled"])
def test_a_model_in_bfloat16_is_not_refused(build_model, name):
    model = build_model(name).bfloat16()
    prepare_policy(model)
    check_logprob_head(model, Scoring(padding_free=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2", "mistral-window", "granite-scaled"])
def test_flash_attention_takes_the_sequences_apart(build_model, batch, name):
    """In bfloat16, where it runs; against padded rows under sdpa with the same weights."""
    pytest.importorskip("flash_attn")
    sizes = {"hidden_size": 128, "head_dim": 32, "dtype": torch.bfloat16}
    padded = build_model(name, attn_implementation="sdpa", **sizes).bfloat16().cuda()
    packed = build_model(name, attn_implementation="flash_attention_2", **sizes).bfloat16().cuda()
    packed.load_state_dict(padded.state_dict())
    for model in (padded, packed):
        prepare_policy(model)
    check_logprob_head(packed, Scoring(padding_free=True))
    on_gpu = batch.to("cuda")
    theirs, ours = (
        completion_logprobs(padded, on_gpu)[0],
        completion_logprobs(packed, on_gpu, Scoring(padding_free=True))[0],
    )
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)
    losses = (
        completion_loss(padded, on_gpu, 0.3).loss,
        completion_loss(packed, on_gpu, 0.3, Scoring(padding_free=True)).loss,
    )
    expected, found = gradients(padded, losses[0]).float(), gradients(packed, losses[1]).float()
    assert (found - expected).norm() <= 0.1 * expected.norm()
