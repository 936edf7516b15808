import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

import gvpo_lightning.policy.head as head_module
from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.policy.head import Scoring, completion_logprobs, install_logprob_head, score
from gvpo_lightning.policy.head_check import check_logprob_head
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer, prepare_policy, stop_token_ids
from gvpo_lightning.rollout.generate import generate_completions
from gvpo_lightning.rollout.groups import GenerationSettings
from tests.error_budget import assert_within, sum_budget
from tests.policy.conftest import ARCHITECTURES, FLOAT32_ALONE, FLOAT32_INSIDE
from tests.policy.eager_scores import eager, gradients, uneven_size
from tests.update_budget import scores_budget

ATTENTION_DROPOUT = ["llama", "mistral-window", "qwen3", "gemma2-softcap", "gemma3", "granite-scaled", "cohere-scaled"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_and_gradients_are_those_of_the_models_own_logits(build_model, ragged, name, dtype):
    if dtype == torch.float64 and name in FLOAT32_ALONE:
        pytest.skip("its attention is not one in float64")
    model = build_model(name).to(dtype)
    prepare_policy(model)
    logprobs, _ = completion_logprobs(model, ragged)
    expected, _ = eager(model, ragged)
    rounded = torch.float32 if name in FLOAT32_INSIDE else dtype
    assert_within(logprobs, expected, scores_budget(model, ragged, rounded))
    assert logprobs[ragged.completion_mask].max() < 0
    assert (logprobs[~ragged.completion_mask] == 0).all()

    ours, theirs = gradients(model, logprobs), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    budget = sum_budget(uneven_size(model, expected, ragged), rounded)
    for parameter, gradient in theirs.items():
        assert_within(ours[parameter], gradient, budget, parameter)


def test_a_head_bias_is_used_and_trained(build_model, ragged):
    model = build_model("phi-head-bias")
    prepare_policy(model)
    with_bias, _ = completion_logprobs(model, ragged)
    assert model.lm_head.bias.abs().max() > 0.5
    assert gradients(model, with_bias)["lm_head.bias"].norm() > 0.1
    model.lm_head.bias.data.zero_()
    without, _ = completion_logprobs(model, ragged)
    assert (with_bias - without).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "mistral-window", "gpt2"])
def test_left_padding_changes_no_logprob(build_model, name):
    model = build_model(name).double()
    prepare_policy(model)
    plain = collate_completions([[3, 4, 5]], [[6, 7, 1]], [False], [0], pad_token_id=0)
    expected, _ = completion_logprobs(model, plain)
    padded = collate_completions([[3, 4, 5], [8] * 9], [[6, 7, 1], [2] * 5], [False] * 2, [0, 1], pad_token_id=0)
    logprobs, _ = completion_logprobs(model, padded)
    torch.testing.assert_close(logprobs[:1, :3], expected, rtol=1e-12, atol=1e-12)
    # what stands in the padding is of no concern
    padded.prompt_ids[~padded.prompt_mask] = 13
    padded.completion_ids[~padded.completion_mask] = 14
    torch.testing.assert_close(completion_logprobs(model, padded)[0], logprobs, rtol=0, atol=0)


def test_a_ragged_batch_equals_one_completion_at_a_time(build_model, ragged):
    model = build_model("qwen2").double()
    prepare_policy(model)
    together, _ = completion_logprobs(model, ragged)
    for row in range(len(ragged)):
        part = ragged.select(torch.tensor([row]))
        alone, _ = completion_logprobs(model, part)
        torch.testing.assert_close(alone, together[row : row + 1, : alone.shape[1]], rtol=1e-12, atol=1e-12)
    for batch_size in (1, 3, 64):
        scored = score(model, ragged, Scoring(1.0), batch_size=batch_size)
        torch.testing.assert_close(scored, together.float())


@pytest.mark.parametrize("name", ["qwen2", "gemma3-softcap", "granite-scaled"])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_and_entropy(build_model, ragged, temperature, name):
    model = build_model(name).double()
    prepare_policy(model)
    logprobs, entropies = completion_logprobs(model, ragged, Scoring(temperature), return_entropy=True)
    expected, expected_entropies = eager(model, ragged, temperature)
    rounded = torch.float32 if name in FLOAT32_INSIDE else torch.float64
    budget = scores_budget(model, ragged, rounded) / temperature
    assert_within(logprobs, expected, budget)
    assert_within(entropies, expected_entropies, budget)
    assert not entropies.requires_grad
    assert (logprobs - eager(model, ragged)[0]).abs().max() > 0.05
    ours, theirs = gradients(model, logprobs), gradients(model, expected)
    budget = sum_budget(uneven_size(model, expected, ragged), rounded)
    for parameter, gradient in theirs.items():
        assert_within(ours[parameter], gradient, budget, parameter)
    assert completion_logprobs(model, ragged)[1] is None


def test_only_positions_that_predict_completion_tokens_reach_the_head(build_model, ragged, monkeypatch):
    model = build_model("qwen2")
    prepare_policy(model)
    rows = []
    head_function = head_module.linear_logprob

    def recording(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return head_function(hidden, *args, **kwargs)

    monkeypatch.setattr(head_module, "linear_logprob", recording)
    completion_logprobs(model, ragged)
    assert rows == [int(ragged.completion_mask.sum())] == [10]


def test_a_batch_without_any_completion_token_still_makes_a_backward_pass(build_model, ragged):
    model = build_model("qwen2")
    prepare_policy(model)
    ragged.drop(torch.ones(4, dtype=torch.bool))
    logprobs, entropies = completion_logprobs(model, ragged, return_entropy=True)
    assert logprobs.shape == entropies.shape == ragged.completion_mask.shape
    logprobs.sum().backward()  # ranks must step together, so there must be a graph
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2"])
def test_other_calls_of_the_model_are_unchanged(build_model, ragged, name):
    plain, installed = build_model(name), build_model(name)
    prepare_policy(installed)
    ids = torch.tensor([[3, 4, 5, 6]])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    for _ in range(2):
        assert torch.equal(installed.eval()(ids).logits, plain.eval()(ids).logits)
        assert torch.equal(installed.generate(**arguments), plain.generate(**arguments))
        completion_logprobs(installed, ragged)
    assert installed.state_dict().keys() == plain.state_dict().keys()


def test_an_exception_inside_leaves_the_head_usable(build_model, ragged):
    model = build_model("qwen2")
    prepare_policy(model)
    before, _ = completion_logprobs(model, ragged)
    wrong = copy.deepcopy(ragged)
    wrong.completion_ids[0, 0] = 10_000
    with pytest.raises(Exception, match="index"):
        completion_logprobs(model, wrong)
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 23)
    assert torch.equal(completion_logprobs(model, ragged)[0], before)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_answers_with_its_own_weights(build_model, ragged, name, duplicate):
    model = build_model(name)
    prepare_policy(model)
    before, _ = completion_logprobs(model, ragged)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(completion_logprobs(twin, ragged)[0], before)
    assert (completion_logprobs(model, ragged)[0] - before).abs().max() > 0.01
    assert twin.get_output_embeddings() is not model.get_output_embeddings()


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("qwen2", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
        ("phi-head-bias", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        *((name, {"attention_dropout": 0.5}) for name in ATTENTION_DROPOUT),
        ("falcon", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),  # read from the config in every forward pass
    ],
)
def test_dropout_is_off_in_training_mode(build_model, ragged, name, rates):
    model = build_model(name, **rates).train()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    assert not torch.equal(model(ids).logits, model(ids).logits)  # it is on at first
    prepare_policy(model)
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(completion_logprobs(model, ragged)[0], completion_logprobs(model.eval(), ragged)[0])


def test_an_nn_dropout_beside_the_models_own_is_switched_off(build_model):
    model = build_model("qwen2")
    model.model.layers[0].mlp.extra = nn.Sequential(nn.Dropout(0.3))
    prepare_policy(model)
    assert model.model.layers[0].mlp.extra[0].p == 0.0


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(build_model, ragged, name):
    model = build_model(name).double()
    prepare_policy(model)
    expected = gradients(model, completion_logprobs(model, ragged)[0])
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    found = gradients(model, completion_logprobs(model, ragged)[0])
    handle.remove()
    assert len(calls) == 2  # the layer ran again in the backward pass
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_head_passes_the_check(build_model, name, dtype):
    model = build_model(name).to(dtype)
    prepare_policy(model)
    check_logprob_head(model)


def test_lora_on_attention(build_model, ragged):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False, r=4)
    model = peft.get_peft_model(build_model("qwen2"), config)
    prepare_policy(model)
    check_logprob_head(model)
    logprobs, _ = completion_logprobs(model, ragged)
    assert_within(logprobs, eager(model, ragged)[0], scores_budget(model, ragged))
    found = gradients(model, logprobs)
    assert found
    assert all("lora_" in name for name in found)
    with model.disable_adapter():
        assert (completion_logprobs(model, ragged)[0] - logprobs).abs().max() > 0.01


def test_lora_generates_and_keeps_the_generation_config(build_model, tokenizer):
    peft = pytest.importorskip("peft")
    base = build_model("qwen2", vocab_size=len(tokenizer))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    prepare_policy(model)
    base.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, top_k=1, do_sample=True)
    batch = generate_completions(model, tokenizer, [[3, 4]], 32, GenerationSettings(max_new_tokens=3), 0)
    assert len(set(batch.completion_ids[:, 0].tolist())) > 1
    assert base.generation_config.top_k == model.generation_config.top_k == 1


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapted_head_is_refused(build_model, settings):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj"]} | settings
    with pytest.raises(ValueError, match="leave lm_head out"):
        install_logprob_head(peft.get_peft_model(build_model("qwen2"), peft.LoraConfig(**settings)))


def test_load_policy_takes_its_own_dtype_not_the_files(build_model, tmp_path, ragged):
    build_model("qwen2").half().save_pretrained(tmp_path / "half")
    model = load_policy(str(tmp_path / "half"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    assert completion_logprobs(model, ragged)[0].dtype == torch.float32
    half = load_policy(str(tmp_path / "half"), LoadingSettings("bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_what_is_no_model_is_named(tmp_path, content):
    folder = tmp_path / "nothing"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"policy='.*nothing'"):
        load_policy(str(folder))
    with pytest.raises(ValueError, match=r"tokenizer='.*nothing'"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([5, 3], 1, (5, 3, 1)),
        (5, None, (5, 1)),
        (None, [7, 1], (7, 1)),
        (None, None, (1,)),
        (0, 0, (0, 1)),
        (99, 98, (1,)),
    ],
)
def test_stop_tokens_come_from_everywhere_and_once(tiny_policy, tokenizer, generation, config, expected):
    model = tiny_policy(eos_token_id=config)
    model.generation_config.eos_token_id = generation
    assert stop_token_ids(model, tokenizer) == expected  # the tokenizer's own is 1; the vocabulary ends at 14


def test_without_any_stop_token_there_is_none(tiny_policy, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    model = tiny_policy(eos_token_id=None)
    assert stop_token_ids(model, without) == ()
