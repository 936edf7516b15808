"""Where a completion ends: by what it says itself, and by nothing else."""

import copy

import pytest
import torch
from transformers import Qwen2ForCausalLM

from gvpo_lightning.data.rows import encode_prompt
from gvpo_lightning.policy.prepare import prepare_policy
from gvpo_lightning.rollout.generate import StopStrings, generate_completions
from gvpo_lightning.rollout.groups import sample_groups
from gvpo_lightning.rollout.settings import GenerationSettings
from tests.small_tokenizers import KINDS, byte_level

STOPS = ((" a",), ("b", "77"), ("€",), ("\n\n",), ("€b", "=:"), ("ab a",), ("=7 ", "</s>", "7<s>"), ("b\n=€ 7ab",))


def policy_for(tiny_policy, tokenizer, **settings):
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = tiny_policy(vocab_size=len(tokenizer), initializer_range=0.1, **(ends | settings))
    prepare_policy(model)
    return model


def sampled(model, tokenizer, prompt, count=64, **settings):
    """The ids of each completion, and whether it is truncated."""
    settings = GenerationSettings(**({"max_new_tokens": 24} | settings))
    batch = generate_completions(model, tokenizer, [encode_prompt(prompt, tokenizer)], count, settings, seed=0)
    ids = [row[mask].tolist() for row, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)]
    return list(zip(ids, batch.truncated.tolist(), strict=True))


def first_end(ids, stop_strings, prompt, tokenizer):
    """How many tokens it takes until the text behind the prompt has a stop string: the plainest way to say it."""
    front = encode_prompt(prompt, tokenizer)
    start = len(tokenizer.decode(front))
    texts = [tokenizer.decode([*front, *ids[: n + 1]])[start:] for n in range(len(ids))]
    return next((n + 1 for n, text in enumerate(texts) if any(stop in text for stop in stop_strings)), None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad_token", ["<unk>", "</s>", "7"])
def test_a_stop_string_ends_what_would_have_been_sampled_without_it(tiny_policy, kind, pad_token):
    """Of several tokens, within one, in the middle of characters, with special tokens and padding inside."""
    tokenizer = KINDS[kind](pad_token=pad_token)
    model, prompt = policy_for(tiny_policy, tokenizer), "7a"
    free = sampled(model, tokenizer, prompt)
    ended = 0
    for stop_strings in STOPS:
        found = sampled(model, tokenizer, prompt, stop_strings=stop_strings)
        for (ids, truncated), (without, _) in zip(found, free, strict=True):
            end = first_end(without, stop_strings, prompt, tokenizer)
            assert ids == without[:end]
            assert truncated == (end is None and without[-1] != tokenizer.eos_token_id)
            ended += end is not None
    assert 20 < ended < 60 * len(STOPS)


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
@pytest.mark.parametrize(("prompt", "stop"), [("3+4=", "=="), ("12", "123"), ("7=7=", "7=7"), ("1+1=", "1+1")])
def test_a_stop_string_that_the_prompt_begins_or_has_ends_nothing(tiny_policy, tokenizer, prompt, stop, pad_token):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    model = policy_for(tiny_policy, tokenizer)
    free = sampled(model, tokenizer, prompt, count=200, max_new_tokens=6)
    found = sampled(model, tokenizer, prompt, count=200, max_new_tokens=6, stop_strings=(stop,))
    texts = [tokenizer.decode(ids) for ids, _ in free]
    assert any(stop in prompt + text and stop not in text for text in texts)
    for (ids, truncated), (without, was_truncated), text in zip(found, free, texts, strict=True):
        if stop not in text:
            assert (ids, truncated) == (without, was_truncated)


def test_a_stop_token_drawn_last_is_an_end(tiny_policy, tokenizer):
    model = policy_for(tiny_policy, tokenizer)
    for ids, truncated in sampled(model, tokenizer, "3+4=", count=200, max_new_tokens=2, stop_strings=("12",)):
        assert truncated == (ids[-1] != 1 and tokenizer.decode(ids) != "12")


def test_texts_are_watched_a_few_tokens_at_a_time():
    """However long completions are: what a step costs must not grow with them."""
    tokenizer = byte_level()
    decoded = []
    original = tokenizer.decode

    def decode(ids, **options):
        decoded.append(len(ids))
        return original(ids, **options)

    tokenizer.decode = decode
    stop = "ab7:=7 a"
    start, texts = tokenizer("7")["input_ids"], (" ab€7" * 60 + stop + "7", stop + " ab€7" * 60, " ab€7" * 61)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    watched = StopStrings((stop,), tokenizer, [2], len(rows))
    for length in range(1, min(map(len, rows)) + 1):
        ended = watched(torch.tensor([start + row[:length] for row in rows]), None)
        assert ended.tolist() == [stop in original(row[:length]) for row in rows]
    assert watched.ends == [len(tokenizer(texts[0][:-1])["input_ids"]), len(tokenizer(stop)["input_ids"]), None]
    assert max(decoded) < 40


class EndsEarly(Qwen2ForCausalLM):
    """As a model that brings its own `generate` along may do."""

    def generate(self, **options):
        return super().generate(**(options | {"max_new_tokens": min(options["max_new_tokens"], 3)}))


class PadsWithText(Qwen2ForCausalLM):
    """What follows an end is not padding."""

    def generate(self, **options):
        return super().generate(**(options | {"pad_token_id": 5}))


@pytest.mark.parametrize("kind", [EndsEarly, PadsWithText])
def test_an_end_that_nothing_explains_is_noticed(tiny_policy, tokenizer, kind):
    model = policy_for(tiny_policy, tokenizer)
    own = kind(model.config)
    prepare_policy(own)
    with pytest.raises(AssertionError, match=rf"{kind.__name__}\.generate must go on to a stop token.*with \["):
        sampled(own, tokenizer, "3+4=", max_new_tokens=6)
    assert sampled(own, tokenizer, "3+4=", count=1, max_new_tokens=1)


@pytest.mark.parametrize("eos_token", ["<eos>", None])
def test_padding_that_the_model_has_no_token_for_does_no_harm(tiny_policy, tokenizer, make_module, fit, eos_token):
    """As after add_special_tokens without resizing the model's embeddings."""
    model = policy_for(tiny_policy, tokenizer)
    expected = sampled(model, tokenizer, "3+4=", stop_strings=("12",))
    own = copy.deepcopy(tokenizer)
    own.eos_token = eos_token
    own.add_special_tokens({"pad_token": "<padding>"})
    assert own.pad_token_id == 15
    assert sampled(model, own, "3+4=", stop_strings=("12",)) == expected
    module = make_module(policy=model, tokenizer=own)
    fit(module, max_steps=2)


def test_rewards_read_special_tokens(tiny_policy, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    model = policy_for(tiny_policy, tokenizer)
    groups = sample_groups(model, tokenizer, [[3, 4]], 100, GenerationSettings(max_new_tokens=4), seed=0)
    silent = {0, 1, 2}  # padding, end and unknown
    for completion in groups[0]:
        ids = [token for token in completion.token_ids.tolist() if token not in silent]
        assert completion.text == "".join(tokenizer.convert_ids_to_tokens(ids))
    assert any("<think>" in completion.text for completion in groups[0])
