"""The offline format: what is written is what is read, and what is not in the format is named by its row."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset

from gvpo_lightning.data.rows import completion_text, encode_behind, encode_prompt
from gvpo_lightning.sources.offline import OfflineFile, encode_completion, prompt_key
from tests.small_tokenizers import KINDS

TALK = [{"role": "user", "content": "3+4="}]
ROWS = [
    {
        "prompt": "3+4=",
        "answer": "7",
        "completions": ["7", "12", ""],
        "rewards": [1.0, None, 0.1],
        "token_ids": [[9, 1], [3, 4], [1]],
        "truncated": [False, True, False],
        "sources": ["policy", "human", "policy"],
        "reference_logprobs": [[-0.1, -1e-9], [-2.123456789, 0.0], [-3.5]],
        "reference": {"model": "m", "weights": "w"},
    },
    {
        "prompt": "1+1=",
        "answer": "2",
        "completions": ["2"],
        "rewards": [0.3333333432674408],
        "token_ids": [[4, 1]],
        "truncated": [False],
        "sources": ["policy"],
        "reference_logprobs": [[-0.3333333432674408, -0.5]],
        "reference": {"model": "m", "weights": "w"},
    },
]


def write(path, rows):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(path, tokenizer) -> OfflineFile:
    return OfflineFile(str(path), "train", tokenizer, len(tokenizer))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_round_trip_loses_nothing(tmp_path, tokenizer, kind, monkeypatch):
    # the token ids are made up: whether they decode to the texts is another test's matter
    monkeypatch.setattr(OfflineFile, "_decodes_otherwise", lambda *_: False)
    file = opened(write(tmp_path / f"rows.{kind}", ROWS), tokenizer)
    for row in ROWS:
        read = file.completions(row["prompt"], [1])
        assert [c.text for c in read] == row["completions"]
        assert [c.token_ids.tolist() for c in read] == row["token_ids"]
        assert [c.truncated for c in read] == row["truncated"]
        assert [c.truncated for c in file.completions(row["prompt"], [9])] == [True] * len(read)  # no end token of 9
        assert [c.source for c in read] == [f"file.{name}" for name in row["sources"]]
        for c, reward, logprobs in zip(read, row["rewards"], row["reference_logprobs"], strict=True):
            assert c.reward == reward or (reward is None and math.isnan(c.reward))
            assert torch.equal(c.reference_logprobs, torch.tensor(logprobs))
    assert file.references == [{"model": "m", "weights": "w"}]
    assert file.source_names == {"file.policy", "file.human"}
    assert file.rows["answer"] == ["7", "2"]
    assert [file.group_size(prompt) for prompt in ("3+4=", "1+1=", "9+9=")] == [3, 1, 0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompt_and_completions_are_enough(tmp_path, tokenizer, kind):
    rows = [{"prompt": "3+4=", "completions": ["7", "12"]}, {"prompt": "3+4=", "completions": ["8"]}]
    file = opened(write(tmp_path / f"rows.{kind}", rows), tokenizer)
    read = file.completions("3+4=", [1])
    assert [c.text for c in read] == ["7", "12", "8"]  # rows of one prompt are one group
    assert [c.token_ids.tolist() for c in read] == [[*tokenizer(t)["input_ids"], 1] for t in ("7", "12", "8")]
    assert all(c.reward is None and c.reference_logprobs is None and c.source == "file" for c in read)
    assert file.num_without_rewards == file.num_without_logprobs == 2


def test_conversations_are_found_whatever_null_keys_parquet_adds(tmp_path, tokenizer):
    rows = [
        {"prompt": TALK, "completions": ["7"]},
        {"prompt": [{"role": "user", "content": "1+1=", "name": "x"}], "completions": ["2"]},
    ]
    file = opened(write(tmp_path / "rows.parquet", rows), tokenizer)
    assert file.group_size(TALK) == 1
    assert prompt_key([{"content": "3+4=", "role": "user", "name": None}]) == prompt_key(TALK)
    assert prompt_key(TALK) != prompt_key("3+4=")


def test_texts_get_one_end_token_unless_truncated(tokenizer):
    assert encode_completion("7", tokenizer, [1]).tolist()[-1] == 1
    assert encode_completion("7", tokenizer, [1], truncated=True).tolist() == tokenizer("7")["input_ids"]
    with_end = "7" + tokenizer.eos_token
    assert encode_completion(with_end, tokenizer, [1]).tolist() == encode_completion("7", tokenizer, [1]).tolist()
    assert encode_completion("", tokenizer, [1]).tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "Row 1 .*prompt must be a text or a list of messages, got ''"),
        ({"prompt": None}, "Row 1 .*prompt must be"),
        ({"completions": None}, "Row 1 .*completions must be a list of texts"),
        ({"rewards": [1.0, 2.0]}, "Row 1 .*rewards must have one entry a completion, 1, got 2"),
        ({"token_ids": [[4, 15]]}, r"Row 1 .*token_ids must be lists of ids in \[0, 15\), got \[4, 15\]"),
        ({"token_ids": [[-1]]}, "Row 1 .*token_ids must be"),
        ({"reference_logprobs": [[-1.0]]}, "Row 1 .*reference_logprobs must have one number for each"),
        ({"reference_logprobs": [[-1.0, 0.5]]}, "Row 1 .*reference_logprobs must be numbers <= 0"),
        ({"reference_logprobs": [None]}, "Row 1 .*reference_logprobs must have one number for each"),
        ({"token_ids": None}, "Row 1 .*reference_logprobs must have one number for each"),
        ({"truncated": [True, False]}, "Row 1 .*truncated must have one entry"),
        ({"sources": []}, "Row 1 .*sources must have one entry"),
    ],
)
def test_rows_that_are_not_in_the_format_are_named(tmp_path, tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / "rows.jsonl", [ROWS[0], ROWS[1] | change]), tokenizer)


def test_malformed_json_is_named(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"sources\.file\.path=.* can't be read as a dataset"):
        opened(tmp_path / "rows.jsonl", tokenizer)


def test_a_split_without_rows_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"train\[5:\].*there are no rows"):
        OfflineFile(path, "train[5:]", tokenizer, len(tokenizer))


def test_token_ids_of_another_tokenizer_are_noticed(tmp_path, tokenizer):
    rows = [{"prompt": "3+4=", "completions": ["77"], "token_ids": [[4, 5, 6, 1]]}] * 3
    with pytest.raises(ValueError, match="made by another one"):
        opened(write(tmp_path / "rows.jsonl", rows), tokenizer)


@pytest.mark.parametrize("texts", [["<think>5</think>9", "12"], ["59", "12"]])
def test_texts_with_special_tokens_and_those_of_earlier_versions_without_are_accepted(tmp_path, tokenizer, texts):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    ids = [[*tokenizer(text)["input_ids"], 1] for text in ("<think>5</think>9", "12")]
    file = opened(write(tmp_path / "rows.jsonl", [{"prompt": "1+", "completions": texts, "token_ids": ids}]), tokenizer)
    assert [completion.text for completion in file.completions("1+", [1])] == texts
    assert [completion.token_ids.tolist() for completion in file.completions("1+", [1])] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_without_token_ids_is_read_as_the_same_tokens(tmp_path, kind):
    """Texts are tokenized in their place behind the prompt, whatever the tokenizer makes of a text's beginning."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = (
        "{% for m in messages %}a{{ m['content'] }}={% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    talk = [{"role": "user", "content": "7"}]
    rows, sampled = [], {}
    for number, prompt in enumerate(("7=", "a:", talk)):
        sampled[number] = [[*encode_behind(prompt, text, tokenizer), 2] for text in (" ab", "ab", "7 a", "\n=")]
        texts = [completion_text(ids, tokenizer, [2]) for ids in sampled[number]]
        assert texts == [" ab", "ab", "7 a", "\n="]
        rows.append({"prompt": prompt, "completions": texts, "truncated": [False] * 4})
    for number, row in enumerate(rows):
        file = opened(write(tmp_path / f"{number}.parquet", [row]), tokenizer)
        read = file.completions(row["prompt"], [2])
        assert [completion.token_ids.tolist() for completion in read] == sampled[number]
        assert [completion.text for completion in read] == row["completions"]
        front = encode_prompt(row["prompt"], tokenizer)
        for completion in read:
            said = tokenizer.decode(front + completion.token_ids[:-1].tolist())
            assert said == tokenizer.decode(front) + completion.text
