"""Format, LengthPenalty and RewardModel, and rewards together."""

import copy
import math
import re

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    XLNetConfig,
)

from gvpo_lightning.data.templates import r1
from gvpo_lightning.rewards import ExactAnswer, Format, LengthPenalty, RewardModel, Rewards, RewardSettings
from tests.error_budget import assert_within, logprob_budget

CHAT = "{% for m in messages %}{{ '+' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("pattern", "full_match", "completion", "expected"),
    [
        (r"<think>.*</think>\d+", True, "<think>a</think>7", 1),
        (r"<think>.*</think>\d+", True, "<think>a</think>7.", 0),
        (r"<think>.*</think>\d+", True, "<think>a\nb</think>7", 0),
        (r"(?s)<think>.*</think>\d+", True, "<think>a\nb</think>7", 1),
        (r"\d", False, "it is 7.", 1),
        (r"\d", False, "it is.", 0),
        (r"", True, "", 1),
    ],
)
def test_format(pattern, full_match, completion, expected):
    assert Format(pattern, full_match)(["p"], [completion], other=[1]) == [expected]


def test_the_documented_pattern_fits_what_follows_the_r1_template(root):
    """Whose prompts have opened <think> already; and completions that open it themselves."""
    (documented,) = re.findall(r"as in\s+`(.*)`\.", Format.__doc__)
    assert documented in (root / "docs" / "rewards.md").read_text()
    reward, prompt = Format(documented), r1("3+4=?")
    completion = prompt.rpartition("Assistant: ")[2] + "7 it is,\nsurely.</think> <answer>\\boxed{7}</answer>"
    assert completion.startswith("<think>")
    right = [completion.removeprefix("<think>"), completion]
    wrong = ["7", right[0].replace("</think>", ""), right[0].replace("boxed", ""), "\\boxed{7}</think>"]
    assert reward([prompt] * 6, right + wrong) == [1, 1, 0, 0, 0, 0]


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"Format.pattern must be a regular expression, got '\(': .*unterminated"):
        Format("(")


def test_a_pattern_that_never_ends_costs_its_completion_alone():
    rewards = Rewards(Format(r"(a+)+"), RewardSettings(num_workers=1, timeout=2.0))
    found, _ = rewards(["p"] * 3, ["a", "a" * 40 + "b", "b"], {})
    assert [rewarded.failure for rewarded in found] == [None, "reward_timeout", None]
    assert [found[0].total, found[2].total] == [1.0, 0.0]
    rewards.close()


def test_length_penalty_is_that_of_dapo():
    def published(length, longest, buffer):  # eq. 13 of arXiv 2503.14476
        if length <= longest - buffer:
            return 0.0
        return (longest - buffer - length) / buffer if length <= longest else -1.0

    ids = [[0] * n for n in range(15)]
    reward = LengthPenalty(max_tokens=10, buffer_tokens=4)
    found, _ = Rewards(reward)(["p"] * 15, ["x"] * 15, {"answer": ["7"] * 15}, ids)
    assert [rewarded.total for rewarded in found] == [published(n, 10, 4) for n in range(15)]
    assert found[8].total == -0.5
    for buffer in (0, 11):
        with pytest.raises(ValueError, match="buffer_tokens must be from 1 to max_tokens=10"):
            LengthPenalty(10, buffer)


def test_only_rewards_that_name_them_get_token_ids():
    def plain(prompts, completions, **columns):
        assert not columns
        return [0.0, 0.0]

    def counting(completion_ids, completions, **columns):
        assert columns == {"prompts": ["p", "q"]}
        return [len(ids) for ids in completion_ids]

    found, _ = Rewards([plain, counting])(["p", "q"], ["x", "y"], {}, [[1], [2, 3]])
    assert [rewarded.total for rewarded in found] == [1, 2]


def test_weights_and_rewards_that_do_not_apply():
    def maths(prompts, completions, kind, **columns):
        return [1.0 if k == "maths" else None for k in kind]

    def code(prompts, completions, kind, **columns):
        return [3.0 if k == "code" else None for k in kind]

    def tone(prompts, completions, kind, **columns):
        return [None if k == "none" else 0.5 for k in kind]

    rewards = Rewards([maths, code, tone], RewardSettings(weights=[2, 1, -1]))
    found, tally = rewards(["p"] * 3, ["x"] * 3, {"kind": ["maths", "code", "none"]})
    assert [rewarded.total for rewarded in found[:2]] == [1.5, 2.5]
    assert math.isnan(found[2].total)
    assert found[0].components == pytest.approx({"maths": 1.0, "code": math.nan, "tone": 0.5}, nan_ok=True)
    assert not tally.counts


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ([Format("a"), Format("b")], {}, r"different names, got \['Format', 'Format'\]: give them a `name`"),
        ([Format("a"), ExactAnswer()], {"weights": [1.0]}, r"one number for each of \['Format', 'ExactAnswer'\]"),
        ([ExactAnswer()], {"weights": [math.nan]}, "one number for each"),
        ([], {}, "empty list"),
    ],
)
def test_settings_that_do_not_fit_are_refused(rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        Rewards(rewards, RewardSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"timeout": 0}, "timeout must be > 0"),
        ({"max_failed_fraction": 1.5}, "from 0 to 1"),
        ({"max_concurrency": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardSettings(**settings)


@pytest.fixture
def reward_model(tmp_path, arithmetic):
    """A folder with a random classifier of so many outputs, and the character tokenizer."""

    def build(num_labels=1, chat=True):
        tokenizer = AutoTokenizer.from_pretrained(arithmetic / "model")
        tokenizer.chat_template = CHAT if chat else None
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            pad_token_id=None,
            num_labels=num_labels,
        )
        model = Qwen2ForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight, std=1.0)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path), model.eval(), tokenizer

    return build


@pytest.mark.parametrize("chat", [True, False])
def test_a_reward_model_gives_its_own_output_alone(reward_model, chat):
    path, model, tokenizer = reward_model()
    texts = ["3+4=", "12+71=", "1+1="]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    completions = ["7", "8", "111112"]
    found, _ = Rewards(RewardModel(path, batch_size=2))(prompts, completions, {"answer": completions})
    for text, completion, rewarded in zip(texts, completions, found, strict=True):
        ids = tokenizer(f"+{text}={completion}" if chat else text + completion, return_tensors="pt").input_ids
        with torch.no_grad():
            alone = model(ids).logits[0, 0]  # no padding, no batch
        assert_within(rewarded.total, alone, logprob_budget(alone))
    assert len({rewarded.total for rewarded in found}) == 3


def classifier(kind, vocab_size):
    """A random one with one output: causal or not, pooled at the last token, at the first one or over all."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": None}
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_labels": 1}
    short = {"vocab_size": vocab_size, "n_layer": 2, "n_head": 4, "num_labels": 1}
    config = {
        "llama": lambda: LlamaConfig(**layers, **sizes),
        "llama, its end as padding": lambda: LlamaConfig(**(layers | {"pad_token_id": 1}), **sizes),
        "gpt2": lambda: GPT2Config(**short, n_embd=32, n_positions=64),
        "bert": lambda: BertConfig(**(layers | {"pad_token_id": 0}), **sizes),
        "xlnet": lambda: XLNetConfig(**short, d_model=32, d_inner=64),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2 and len(parameter) == 1:  # the head's
            torch.nn.init.normal_(parameter, std=1.0)
    return model


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>", None])
@pytest.mark.parametrize("kind", ["llama", "llama, its end as padding", "gpt2", "bert", "xlnet"])
def test_no_padding_and_no_neighbour_changes_a_reward_models_output(tmp_path, tokenizer, kind, pad_token):
    """Texts of all lengths, some with the end's or the padding's token last, and together with every token there is."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    if pad_token is None:
        tokenizer.eos_token = None  # then there is nothing to pad with
    tokenizer.save_pretrained(tmp_path)
    classifier(kind, len(tokenizer)).save_pretrained(tmp_path)
    completions = [
        "7",
        "1",
        "12<eos>",
        "12",
        "3<eos><eos>",
        "45+67",
        "8<pad>",
        "9<pad><eos>",
        "<eos>",
        "0123456789+=<unk>x",
    ]
    reward = RewardModel(str(tmp_path), batch_size=4)
    found = reward(["3+4="] * len(completions), completions)
    dtype = torch.float32 if kind == "xlnet" else torch.float64  # XLNet can't be told
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    alone.config.pad_token_id = None  # the last token is the last
    for completion, output in zip(completions, found, strict=True):
        ids = tokenizer("3+4=" + completion, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = alone(ids).logits[0, 0]
        assert_within(output, expected, logprob_budget(expected))
        (by_itself,) = reward(["3+4="], [completion])
        assert_within(by_itself, expected, logprob_budget(expected))
    assert len({round(output, 5) for output in found}) == len(found)


def test_a_batch_of_a_reward_model_is_of_all_lengths_where_padding_changes_nothing(tmp_path, tokenizer):
    done = {}
    for kind in ("llama", "bert"):
        tokenizer.save_pretrained(tmp_path / kind)
        classifier(kind, len(tokenizer)).save_pretrained(tmp_path / kind)
        reward = RewardModel(str(tmp_path / kind), batch_size=4)
        done[kind] = []
        reward.track(done[kind].append)
        reward(["1+1="] * 6, ["2", "22", "3", "333", "44", "4"])
    assert done == {"llama": [4, 2], "bert": [3, 2, 1]}


def test_what_is_too_long_for_the_reward_model_is_a_failure(reward_model):
    path, _, _ = reward_model()
    found, tally = Rewards(RewardModel(path))(["1+1="] * 3, ["2" * 12, "2" * 13, "2"], {})
    assert [rewarded.failure for rewarded in found] == [None, "reward_raised", None]
    assert "its 17 tokens with the prompt exceed the reward model's context of 16" in tally.first["RewardModel"]


def test_a_classifier_with_several_outputs_is_no_reward_model(reward_model):
    path, _, _ = reward_model(num_labels=2)
    with pytest.raises(ValueError, match=r"one output .*has 2"):
        RewardModel(path)


def test_a_reward_model_goes_where_the_policy_is_and_is_no_part_of_the_module(reward_model, tiny_policy, tokenizer):
    from gvpo_lightning import GVPOModule

    path, _, _ = reward_model()
    reward = RewardModel(path)
    module = GVPOModule(tiny_policy(), reward, tokenizer)
    rewards = module.rewards
    rewards(["1+1="], ["2"], {})
    rewards.place(torch.device("meta"))
    assert {p.device.type for p in reward._model.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert len(list(module.parameters())) == len(list(module.policy.parameters()))
