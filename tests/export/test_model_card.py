"""What a model card shows of a run's config: nothing secret, no path of one machine, and the rest as it was."""

from pathlib import Path

import pytest
import yaml

from gvpo_lightning import GVPOModule, ObjectiveSettings
from gvpo_lightning.export.model_card import Origin, publishable, write_card

SECRET_KEYS = ["api_key", "key", "apikey", "access_key", "hf_token", "aws_secret_access_key", "credentials", "passwd"]
SECRET_KEYS += ["authorization", "auth", "private_key", "Bearer", "token"]
SHOWN = {
    "template": "/no_think {problem}",
    "other": "~ {problem} / x",
    "system": "Answer a/b: see https://example.org/help",
    "eos_token": "<|end|>",
    "token_env": "SCORER_TOKEN",
    "max_new_tokens": 8,
    "stop_tokens": ["</s>"],
    "tokenizer": "Qwen/Qwen2.5-0.5B",
    "class_path": "torch.optim.AdamW",
    "split": "train[:16]",
    "path": "openai/gsm8k",
    "relative": "configs/arithmetic/sums",
    "tokenize": True,
    "rate": 1.0e-6,
}


@pytest.mark.parametrize("key", SECRET_KEYS)
@pytest.mark.parametrize("value", ["hush", 1234, ["hush"], {"x": "hush"}, {"x": [{"y": "hush"}]}])
def test_what_sounds_like_a_secret_is_left_out_with_all_that_is_under_it(key, value):
    assert publishable({"reward": [{"init_args": {key: value}}]}) == {"reward": [{"init_args": {key: "(left out)"}}]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://user:hush@host:80/score?api_key=hush", "https://host:80/score"),
        ("see https://user:hu@sh@host/a#hush now", "see https://host/a now"),
        ("/home/alice/a.jsonl", "a.jsonl"),
        ("~/a/", "a"),
        ("C:\\Users\\alice\\x", "x"),
        ("file:///home/alice/x", "x"),
        ("../../home/alice/x", "x"),
        ("data/../../alice/x", "x"),
        ("data=/home/alice/x", "data=x"),
        ("a=/home/alice/x,b=/home/alice/y", "a=x,b=y"),
        (Path("/home/alice/my data"), "my data"),
        (["/home/alice/x"], ["x"]),
    ],
)
def test_urls_lose_what_may_be_secret_and_paths_their_folders(value, shown):
    assert publishable({"a": value}) == {"a": shown}


def test_a_path_with_spaces_is_known_where_it_exists(tmp_path):
    (tmp_path / "my data").mkdir()
    assert publishable({"a": str(tmp_path / "my data")}) == {"a": "my data"}


def test_everything_else_is_shown_as_it_was():
    assert publishable(SHOWN) == SHOWN


def card(tiny_policy, tokenizer, folder, name, config):
    policy = tiny_policy(0)
    policy.name_or_path = name
    module = GVPOModule(policy, lambda prompts, completions: [0.0], tokenizer)
    write_card(folder, module.source, "adapter", Origin(module.settings, config, None))
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_fence_in_a_value_does_not_end_the_block(tiny_policy, tokenizer, tmp_path):
    config = {"template": "```\n{problem}\n```\nand ````", "after": 1}
    _, text = card(tiny_policy, tokenizer, tmp_path, "model", config)
    assert yaml.safe_load(text.split("`````yaml\n")[1].split("\n`````\n")[0]) == config


@pytest.mark.parametrize("name", ["data/prompts.jsonl", "mine/prompts.parquet", "outputs/run", "here/model"])
def test_what_may_be_a_path_is_not_taken_for_a_name_on_the_hub(tiny_policy, tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    front, text = card(tiny_policy, tokenizer, tmp_path, name, {"data": {"path": name}})
    assert not front.keys() & {"base_model", "datasets"}
    assert 'from_pretrained("BASE")' in text
    front, text = card(tiny_policy, tokenizer, tmp_path, "Qwen/Qwen2.5-0.5B", {"data": {"path": "openai/gsm8k"}})
    assert (front["base_model"], front["datasets"]) == ("Qwen/Qwen2.5-0.5B", ["openai/gsm8k"])
    assert 'from_pretrained("Qwen/Qwen2.5-0.5B")' in text


@pytest.mark.parametrize(
    ("objective", "title", "said", "tags"),
    [
        (ObjectiveSettings(), "# model-gvpo", "reweighted by `exp(reward / beta)`", ["gvpo", "reinforcement-learning"]),
        (ObjectiveSettings(length_exponent=1.0), "# model-gvpo", "**gvpo (length_exponent: 1.0)**", None),
        (ObjectiveSettings(covariance_term=False), "# model-gvpo", "**gvpo (covariance_term: False)**", None),
        (ObjectiveSettings("grpo"), "# model-grpo", "the objective **grpo** of", ["grpo", "reinforcement-learning"]),
        (ObjectiveSettings("dpo"), "# model-dpo", "the objective **dpo** of", ["dpo"]),
    ],
)
def test_the_optimum_is_promised_of_gvpo_alone(tiny_policy, tokenizer, tmp_path, objective, title, said, tags):
    policy = tiny_policy(0)
    policy.name_or_path = "model"
    module = GVPOModule(policy, lambda prompts, completions: [0.0], tokenizer, objective=objective)
    write_card(tmp_path, module.source, "model", Origin(module.settings, None, None))
    text = (tmp_path / "README.md").read_text()
    assert title in text.splitlines()
    assert said in text
    assert ("The one optimum" in text) == objective.is_gvpo
    assert ("## Citation" in text) == (objective.kind == "gvpo")
    if tags:
        assert yaml.safe_load(text.split("---")[1])["tags"] == tags
