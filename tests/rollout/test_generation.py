import copy
import math

import pytest
import torch
from transformers import GenerationConfig

from gvpo_lightning.data.rows import encode_prompt
from gvpo_lightning.policy.head import completion_logprobs, evaluating
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer, prepare_policy
from gvpo_lightning.rollout.generate import cut_after_stop, generate_completions
from gvpo_lightning.rollout.groups import sample_rollout
from gvpo_lightning.rollout.settings import GenerationSettings


@pytest.fixture
def policy(tiny_policy):
    """A random policy whose next-token distributions are far from uniform."""
    model = tiny_policy(initializer_range=0.3)
    prepare_policy(model)
    return model


def sample(model, tokenizer, prompts=((3, 4),), count=64, seed=0, **settings):
    settings = GenerationSettings(**({"max_new_tokens": 5} | settings))
    return generate_completions(model, tokenizer, [list(p) for p in prompts], count, settings, seed)


def next_token_probabilities(model, prompt, temperature=1.0):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([list(prompt)])).logits[0, -1].double() / temperature, dim=-1)


def chi_square(observed, expected):
    """Pearson's statistic in standard deviations from its mean, cells of fewer than 5 expected joined."""
    small = expected < 5
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    cells = expected > 0
    freedom = int(cells.sum()) - 1
    statistic = float(((observed - expected)[cells] ** 2 / expected[cells]).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("ids", "stops", "expected"),
    [
        ([5, 6, 1, 0, 0], [1], [5, 6, 1]),
        ([5, 6, 7], [1], [5, 6, 7]),
        ([1, 1, 1], [1], [1]),  # the padding id is the stop id
        ([5, 3, 1], [1, 3], [5, 3]),
        ([5, 0, 1], [1], [5, 0, 1]),  # the padding id in front of the stop is content
        ([5, 6], [], [5, 6]),
        ([], [1], []),
    ],
)
def test_cut_after_stop(ids, stops, expected):
    assert cut_after_stop(ids, stops) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_samples_follow_the_exact_probabilities(policy, tokenizer, temperature):
    prompts, count = ((3, 4), (5,)), 4000
    batch = sample(policy, tokenizer, prompts, count, seed=3, max_new_tokens=1, temperature=temperature)
    for group, prompt in enumerate(prompts):  # the second is padded
        exact = next_token_probabilities(policy, prompt, temperature)
        first = batch.completion_ids[batch.group_ids == group, 0]
        assert abs(chi_square(torch.bincount(first, minlength=15).double(), exact * count)) < 4
        uniform = torch.full_like(exact, count / 15)
        assert chi_square(torch.bincount(first, minlength=15).double(), uniform) > 50  # the measure can tell


def test_whole_completions_follow_their_exact_probabilities(policy, tokenizer):
    """Means of the exact log-prob over samples equal minus the exact entropy: positions and masks agree."""
    batch = sample(policy, tokenizer, count=3000, max_new_tokens=4)
    with torch.no_grad():
        logprobs, entropies = completion_logprobs(policy, batch, return_entropy=True)
    difference = (logprobs + entropies).sum(dim=1).double()  # a martingale: mean 0
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(batch))
    assert difference.std() > 0.3


def test_other_samplers_are_obeyed_where_asked_for(policy, tokenizer):
    order = next_token_probabilities(policy, (3, 4)).argsort(descending=True).tolist()
    kept = sample(policy, tokenizer, count=500, max_new_tokens=1, top_k=3).completion_ids[:, 0].tolist()
    assert set(kept) == set(order[:3])
    kept = sample(policy, tokenizer, count=100, max_new_tokens=1, top_p=0.01).completion_ids[:, 0].tolist()
    assert set(kept) == {order[0]}
    probabilities = next_token_probabilities(policy, (3, 4))
    kept = sample(policy, tokenizer, count=500, max_new_tokens=1, min_p=0.5).completion_ids[:, 0].tolist()
    assert set(kept) == set((probabilities >= 0.5 * probabilities.max()).nonzero().flatten().tolist())
    kept = sample(policy, tokenizer, count=50, max_new_tokens=1, temperature=0.0).completion_ids[:, 0].tolist()
    assert set(kept) == {order[0]}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_p": 0.1},
        {"temperature": 0.01},
        {"repetition_penalty": 50.0},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"num_beams": 3},
        {"num_return_sequences": 2},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[5], [6]]},
        {"suppress_tokens": [7, 8]},
        {"min_new_tokens": 5},
        {"max_length": 3},
        {"do_sample": False},
    ],
    ids=str,
)
def test_the_models_own_generation_config_has_no_say(policy, tokenizer, settings):
    expected = sample(policy, tokenizer)
    own = GenerationConfig(**({"eos_token_id": 1, "pad_token_id": 0, "do_sample": True} | settings))
    policy.generation_config = own
    found = sample(policy, tokenizer)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert policy.generation_config is own


def test_a_stop_token_in_the_prompt_neither_ends_nor_masks_anything(policy, tokenizer):
    prompts = ((1, 3, 1), (4, 1), (0, 5))
    batch = sample(policy, tokenizer, prompts, 200)
    assert batch.prompt_mask.sum(dim=1).unique_consecutive().tolist() == [3, 2]
    assert (batch.lengths >= 1).all()
    assert (batch.lengths > 1).any()
    for group, prompt in enumerate(prompts):
        rows = batch.group_ids == group
        assert batch.prompt_ids[rows][0][batch.prompt_mask[rows][0]].tolist() == list(prompt)
        exact = next_token_probabilities(policy, prompt)
        observed = torch.bincount(batch.completion_ids[rows, 0], minlength=15).double()
        assert abs(chi_square(observed, exact * 200)) < 4


def check_masks(batch, stops):
    """Masks are a prefix up to and with the first stop; `truncated` says that there is none."""
    for ids, mask, truncated in zip(batch.completion_ids, batch.completion_mask, batch.truncated, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        content = ids[:length].tolist()
        assert not set(content[:-1]) & set(stops)
        assert (content[-1] in stops) != bool(truncated)
        assert not truncated or length == len(mask)


def test_every_one_of_several_stop_tokens_ends_a_completion(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 9]
    batch = sample(policy, tokenizer, count=300)
    check_masks(batch, {1, 7, 9})
    last = batch.completion_ids[~batch.truncated].gather(1, batch.lengths[~batch.truncated, None] - 1)
    assert set(last.flatten().tolist()) == {1, 7, 9}
    assert batch.truncated.any()


@pytest.mark.parametrize("pad_token", ["<eos>", None])
def test_padding_with_the_stop_token(policy, tokenizer, pad_token):
    expected = sample(policy, tokenizer, ((3, 4), (5,)), 100)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    batch = sample(policy, tokenizer, ((3, 4), (5,)), 100)
    check_masks(batch, {1})
    assert torch.equal(batch.completion_mask, expected.completion_mask)
    assert torch.equal(batch.completion_ids[batch.completion_mask], expected.completion_ids[batch.completion_mask])
    assert (batch.completion_ids[~batch.completion_mask] == 1).all()


def test_truncated_marks_completions_without_a_stop(policy, tokenizer):
    batch = sample(policy, tokenizer, count=200, max_new_tokens=3)
    check_masks(batch, {1})
    assert 0 < batch.truncated.sum() < 200
    assert batch.completion_ids.shape == (200, 3)
    assert (batch.lengths[batch.truncated] == 3).all()


@pytest.mark.parametrize("stops", [("7",), ("12", "=")])
@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_stop_strings_cut_what_would_have_been_sampled(policy, tokenizer, stops, pad_token):
    """The same draws without them are the truth: a prefix of those, to the first stop, is what must come."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    free = sample(policy, tokenizer, max_new_tokens=8)
    stopped = sample(policy, tokenizer, max_new_tokens=8, stop_strings=stops)
    ended = 0
    for ids, mask, found, found_mask, truncated in zip(
        free.completion_ids, free.completion_mask, stopped.completion_ids, stopped.completion_mask, stopped.truncated,
        strict=True,
    ):  # fmt: skip
        ids, found = ids[mask].tolist(), found[found_mask].tolist()
        texts = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        end = next((n + 1 for n, text in enumerate(texts) if any(stop in text for stop in stops)), None)
        assert found == ids[:end]
        assert bool(truncated) == (end is None and ids[-1] != 1)
        ended += end is not None
    assert 8 <= ended < 64  # some do, some don't


def test_a_stop_string_of_several_tokens_stays_in_the_completion(root):
    folder = str(root / "configs" / "gsm8k_tiny" / "model")
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    prompt = tokenizer("How many")["input_ids"]
    free = sample(model, tokenizer, [prompt], count=1, max_new_tokens=12, temperature=0)
    ids = free.completion_ids[0][free.completion_mask[0]].tolist()
    text = tokenizer.decode(ids)
    middle = text[len(text) // 3 : len(text) // 3 + 4]
    stopped = sample(model, tokenizer, [prompt], count=1, max_new_tokens=12, temperature=0, stop_strings=(middle,))
    found = stopped.completion_ids[0][stopped.completion_mask[0]].tolist()
    assert found == ids[: len(found)]
    assert middle in tokenizer.decode(found)
    assert middle not in tokenizer.decode(found[:-1])
    assert not stopped.truncated[0]


def test_the_seed_decides_the_samples_and_nothing_else_moves(policy, tokenizer):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = sample(policy, tokenizer, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(10)
    assert torch.equal(sample(policy, tokenizer, seed=5).completion_ids, first.completion_ids)
    assert not torch.equal(sample(policy, tokenizer, seed=6).completion_ids, first.completion_ids)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_as_before(policy, tokenizer, training):
    policy.train(training)
    sample(policy, tokenizer, count=2)
    assert all(module.training == training for module in policy.modules())
    with pytest.raises(ValueError, match="inside"), evaluating(policy):
        raise ValueError("inside" if not policy.training else "not evaluating")
    assert policy.training == training


def test_gradient_checkpointing_changes_no_sample(policy, tokenizer):
    expected = sample(policy, tokenizer)
    policy.gradient_checkpointing_enable()
    assert torch.equal(sample(policy, tokenizer).completion_ids, expected.completion_ids)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generating_in_parts_keeps_the_order_of_rows(policy, tokenizer, batch_size):
    prompts = ((3, 4), (5,), (6, 7, 8))
    batch = sample(policy, tokenizer, prompts, 4, batch_size=batch_size, top_k=1)  # greedy: parts draw differently
    assert batch.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for group, prompt in enumerate(prompts):
        alone = sample(policy, tokenizer, (prompt,), 1, top_k=1)
        for row in range(4 * group, 4 * group + 4):
            assert batch.prompt_ids[row][batch.prompt_mask[row]].tolist() == list(prompt)
            expected = alone.completion_ids[0][alone.completion_mask[0]]
            assert torch.equal(batch.completion_ids[row][batch.completion_mask[row]], expected)


def test_parts_are_not_copies_of_each_other(policy, tokenizer):
    batch = sample(policy, tokenizer, count=32, batch_size=8)
    parts = batch.completion_ids.split(8)
    assert not any(torch.equal(parts[0], part) for part in parts[1:])


def test_sampling_in_inference_mode_does_not_poison_training(policy, tokenizer):
    rows = [{"prompt": "3+4="}, {"prompt": "12+7="}]
    settings = GenerationSettings(max_new_tokens=4)
    with torch.inference_mode():
        rollout = sample_rollout(policy, tokenizer, rows, 3, settings, seed=0)
    logprobs, _ = completion_logprobs(policy, rollout.batch)
    logprobs.sum().backward()
    assert not any(tensor.is_inference() for tensor in rollout.batch.state_dict().values())
    assert all(p.grad is not None for p in policy.parameters())
    outside = sample_rollout(policy, tokenizer, rows, 3, settings, seed=0)
    assert outside.completions == rollout.completions


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['content'] }}+{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_plain_prompt_is_tokenized_as_it_is(tokenizer):
    assert tokenizer.decode(encode_prompt("12+7=", tokenizer)) == "12+7="


def test_a_conversation_goes_through_the_chat_template(chat_tokenizer):
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "23"}]
    assert encode_prompt(messages, chat_tokenizer) == chat_tokenizer("1+23+=")["input_ids"]


def test_special_tokens_are_not_added_to_what_the_template_wrote(chat_tokenizer):
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    assert encode_prompt("12", chat_tokenizer)[0] == 1
    assert encode_prompt([{"role": "user", "content": "12"}], chat_tokenizer)[0] != 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "must be a string or a list of .* got int: '5'"),
        (None, "got NoneType"),
        ([], "got list"),
        (["hello"], "got list"),
        ([{"content": "no role"}], "got list"),
        ({"role": "user", "content": "1"}, "got dict"),
        ("", "at least one token"),
        ([{"role": "tool", "content": "1"}], "chat template refuses .*no tools here"),
    ],
)
def test_unusable_prompts_are_refused(chat_tokenizer, prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, chat_tokenizer)


def test_a_conversation_without_a_chat_template_is_refused(tokenizer):
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="has no chat template"):
        encode_prompt([{"role": "user", "content": "1"}], tokenizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("batch_size", 0),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"generation\.{name} must be .*, got {value}"):
        GenerationSettings(**{name: value})


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match=r"generation\.stop_strings must be texts that are not empty"):
        GenerationSettings(stop_strings=("</answer>", ""))
