import copy
import gzip
import json
import warnings

import datasets
import lightning as L
import pytest
from datasets import Dataset, DatasetDict

from gvpo_lightning.data.rows import load_splits
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rewards import BoxedMath, ExactAnswer, Format
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def sums(count):
    return [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(count)]


def as_disk_dataset(rows, path):
    Dataset.from_list(rows).save_to_disk(path / "saved")
    return path / "saved"


def as_disk_dict(rows, path):
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(path / "saved")
    return path / "saved"


def as_jsonl(rows, path):
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path / "rows.jsonl"


def as_json(rows, path):
    (path / "rows.json").write_text(json.dumps(rows))
    return path / "rows.json"


def as_parquet(rows, path):
    Dataset.from_list(rows).to_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def as_folder_of_files(rows, path):
    (path / "files").mkdir()
    return as_jsonl(rows, path / "files").rename(path / "files" / "train.jsonl").parent


FORMATS = [as_disk_dataset, as_disk_dict, as_jsonl, as_json, as_parquet, as_folder_of_files]


def reward(prompts, completions, **columns):
    return [0.0] * len(completions)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture
def attach(tiny_policy, chat_tokenizer):
    """Sets a datamodule up for one stage of a real Trainer with a real module."""

    def build(datamodule, stage="fit", **settings) -> PromptDataModule:
        arguments = {
            "tokenizer": chat_tokenizer,
            "reward": reward,
            "rollout": RolloutSettings(2, prompts_per_rollout=4, prompts_per_update=4),
            "generation": GenerationSettings(max_new_tokens=4),
        }
        module = GVPOModule(tiny_policy(max_position_embeddings=2048), **(arguments | settings))
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        trainer.strategy.connect(module)
        module.trainer = datamodule.trainer = trainer
        datamodule.setup(stage)
        return datamodule

    return build


def train_rows(datamodule, rollouts=1):
    """The rows of the first rollouts, in their order."""
    loader, rows = datamodule.train_dataloader(), []
    while rollouts:
        for batch in loader:
            loader.module.run.microstep += 1
            if batch["rows"] is not None and rollouts:
                rows += batch["rows"]
                rollouts -= 1
    return rows


def evaluation_rows(loader):
    return [row for batch in loader for row in batch]


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_gives_the_same_rows(attach, tmp_path, save):
    path = save(sums(8), tmp_path)
    files = sorted(tmp_path.rglob("saved/**/*"))
    datamodule = attach(PromptDataModule(str(path), validation_split="train[6:]"))
    assert sorted(train_rows(datamodule, 2), key=lambda row: int(row["answer"])) == sums(8)
    assert evaluation_rows(datamodule.val_dataloader()) == sums(8)[6:]
    assert sorted(tmp_path.rglob("saved/**/*")) == files  # nothing is written into the user's folder


def test_long_prompts_are_left_out_where_that_is_asked_for(attach, tmp_path, caplog):
    path = str(as_jsonl([*sums(8), {"prompt": "1+1+1+1=", "answer": "4"}], tmp_path))
    caplog.set_level("INFO", logger="lightning.pytorch")
    datamodule = attach(PromptDataModule(path, max_prompt_tokens=6))
    assert "1+1+1+1=" not in {row["prompt"] for row in train_rows(datamodule, rollouts=4)}
    assert "1 of the 9 prompts of 'train' are longer than data.max_prompt_tokens=6" in caplog.text
    with pytest.raises(ValueError, match=r"all prompts exceed data.max_prompt_tokens=2: the shortest has 4"):
        attach(PromptDataModule(path, max_prompt_tokens=2))


def test_splits_and_slices(attach, tmp_path):
    splits = {"train": Dataset.from_list(sums(10)), "held_out": Dataset.from_list(sums(20)[10:])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    settings = {
        "train_split": "train[:40%]",
        "validation_split": "train[4:7]",
        "test_split": "held_out[-2:]",
        "batch_size": 2,
    }

    def build(stage, **more):
        return attach(PromptDataModule(str(tmp_path / "saved"), **(settings | more)), stage)

    assert {row["answer"] for row in train_rows(build("fit"))} == {"1", "2", "3", "4"}
    assert [len(batch) for batch in build("fit").val_dataloader()] == [2, 1]
    assert [row["answer"] for row in evaluation_rows(build("validate").val_dataloader())] == ["5", "6", "7"]
    assert [row["answer"] for row in evaluation_rows(build("test").test_dataloader())] == ["19", "20"]
    assert [row["answer"] for row in evaluation_rows(build("predict").predict_dataloader())] == ["19", "20"]
    without_test = build("predict", test_split=None)
    assert [row["answer"] for row in evaluation_rows(without_test.predict_dataloader())] == ["5", "6", "7"]
    assert build("fit", validation_split=None).val_dataloader() == []


def test_the_order_is_the_seeds(attach, tmp_path, monkeypatch):
    path = str(as_jsonl(sums(12), tmp_path))
    first = train_rows(attach(PromptDataModule(path)), 3)
    assert first == train_rows(attach(PromptDataModule(path)), 3)
    assert first != sums(12)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert first != train_rows(attach(PromptDataModule(path)), 3)


R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: {}\nAssistant: <think>"
)


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "3+1="),
        ({"prompt_column": "answer"}, "4"),
        ({"prompt_template": "{prompt}{answer}+{level}="}, "3+1=4+0="),
        (
            {"prompt_template": "qwen_math"},
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            "<|im_start|>user\n3+1=<|im_end|>\n<|im_start|>assistant\n",
        ),
        ({"prompt_template": "r1", "prompt_column": "answer"}, R1.format("4")),
        ({"conversational": True}, [{"role": "user", "content": "3+1="}]),
        (
            {"system_prompt": "12", "prompt_column": "answer"},
            [{"role": "system", "content": "12"}, {"role": "user", "content": "4"}],
        ),
        (
            {"conversational": True, "prompt_template": "{answer}="},
            [{"role": "user", "content": "4="}],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("save", [as_jsonl, as_disk_dict])
def test_prompts_are_made_of_columns(attach, tmp_path, save, settings, prompt):
    path = str(save(sums(5), tmp_path))
    datamodule = attach(PromptDataModule(path, validation_split="train", **settings))
    row = evaluation_rows(datamodule.val_dataloader())[3]
    assert row == {"prompt": prompt, "answer": "4", "level": 0}


def test_conversations_in_the_data_stay_as_they_are(attach, tmp_path):
    talk = [{"role": "user", "content": "1+"}, {"role": "assistant", "content": "2="}]
    path = str(as_jsonl([{"talk": talk, "answer": "3"}] * 4, tmp_path))
    datamodule = attach(PromptDataModule(path, prompt_column="talk", conversational=True))
    assert train_rows(datamodule)[0] == {"talk": talk, "prompt": talk, "answer": "3"}


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        ({"prompt_column": "question"}, "fit", r"'question' is not a column of .*\['prompt', 'answer', 'level'\]"),
        ({"prompt_template": "{question}"}, "fit", r"asks for 'question', the rows have"),
        ({"prompt_template": "{} ="}, "fit", r"prompt_template='\{\} =' asks for"),
        ({"prompt_template": "{answer.value}"}, "fit", "asks for .* no attribute 'value'"),
        ({"prompt_template": "{answer"}, "fit", "expected '}'"),
        ({"prompt_template": "qwen-math"}, "fit", r"'qwen-math' names no column.*one of \['qwen_math', 'r1'\]"),
        ({"prompt_template": "R1"}, "fit", "'R1' names no column"),
        ({"prompt_template": "{prompt} in {{}}: \\boxed{}"}, "fit", r"literally are doubled: \\boxed\{\{\}\}"),
        ({"prompt_template": "qwen_math", "conversational": True}, "fit", "'qwen_math' is a whole prompt already"),
        ({"prompt_template": "r1", "system_prompt": "Think."}, "test", "conversational: false and system_prompt: null"),
        ({"train_split": "training"}, "fit", r"'training' names no split; there are \['train'\]"),
        ({"train_split": "train[:"}, "fit", r"'train\[:' names no split"),
        ({"train_split": "train+train"}, "fit", "joins several splits"),
        ({"train_split": "train[5:]"}, "fit", r"data.train_split='train\[5:\]' of .* is empty"),
        ({"validation_split": "train[:0]"}, "fit", "data.validation_split=.* is empty"),
        ({}, "validate", r"no validation data: set data.validation_split to one of \['train'\]"),
        ({}, "test", "no test data: set data.test_split"),
        ({}, "predict", "no validation data"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_data_are_refused(attach, tmp_path, settings, stage, message):
    path = str(as_jsonl(sums(5), tmp_path))
    with pytest.raises(ValueError, match=message):
        attach(PromptDataModule(path, **settings), stage)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "'train': row 3 has an empty prompt"),
        (None, "'train': row 3 has an empty prompt"),
        ("1" * 3000, "Row 3: the prompt's 3000 tokens"),
    ],
)
@pytest.mark.parametrize("split", ["train_split", "validation_split"])
def test_unusable_prompts_are_named_by_their_row(attach, tmp_path, value, message, split):
    rows = sums(5)
    rows[3]["prompt"] = value
    path = str(as_jsonl(rows, tmp_path))
    settings = {"train_split": "train[:3]"} | {split: "train"}
    with pytest.raises(ValueError, match=message):
        attach(PromptDataModule(path, **settings))


def test_an_empty_conversation_and_a_number_are_no_prompts(attach, tmp_path):
    talk = [{"role": "user", "content": "1"}]
    path = str(as_jsonl([{"prompt": talk}, {"prompt": []}], tmp_path))
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        attach(PromptDataModule(path))
    path = str(as_jsonl([{"prompt": 5}], tmp_path))
    with pytest.raises(ValueError, match=r"Row 0: A prompt must be a string .* got int"):
        attach(PromptDataModule(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "JSON parse error"),
        ("rows.jsonl", "no json at all", "JSON parse error"),
        ("rows.jsonl", "", "is an empty file"),
        ("rows.parquet", "no parquet", "rows.parquet' can't be read as a dataset"),
        ("missing.jsonl", None, "Unable to find .*missing.jsonl"),
        ("missing_folder", None, "missing_folder' can't be read as a dataset"),
        ("saved/state.json", "{", "saved' can't be read as a dataset"),
    ],
)
def test_unreadable_data_is_named_with_the_reason(attach, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    path = path.parent if path.parent != tmp_path else path
    with pytest.raises(ValueError, match=message) as error:
        attach(PromptDataModule(str(path)))
    assert f"data.path={str(path)!r}" in str(error.value)


def test_a_hub_name_without_network_is_one_clear_line(attach):
    with pytest.raises(ValueError, match=r"data.path='some-one/some-data' can't be read .*Hub") as error:
        attach(PromptDataModule("some-one/some-data"))
    assert "\n" not in str(error.value)


GSM8K = {
    "prompt_column": "problem",
    "train_split": "train[:7473]",
    "validation_split": "train[7473:7483]",
    "test_split": "train[7473:]",
}


def test_gsm8k_keeps_training_and_test_rows_apart(attach, tmp_path, shared_data, root):
    from transformers import AutoTokenizer

    folder = shared_data / "gsm_8k"
    files = sorted(folder.rglob("*"))
    tokenizer = AutoTokenizer.from_pretrained(root / "configs" / "gsm8k_tiny" / "model")
    datamodule = attach(PromptDataModule(str(folder), **GSM8K), tokenizer=tokenizer)
    source = datasets.load_from_disk(str(folder))["train"]
    loader = datamodule.train_dataloader()
    assert loader.num_prompts == 7473
    assert loader.rollouts_per_epoch == 7473 // 4
    train = {row["prompt"] for row in loader.prompts}
    assert train == set(source["problem"][:7473])

    test = evaluation_rows(
        attach(PromptDataModule(str(folder), **GSM8K), "test", tokenizer=tokenizer).test_dataloader()
    )
    assert [row["prompt"] for row in test] == source["problem"][7473:]
    assert [row["answer"] for row in test] == source["answer"][7473:]
    assert len(test) == 1319
    assert not train & {row["prompt"] for row in test}
    assert [row["prompt"] for row in evaluation_rows(datamodule.val_dataloader())] == source["problem"][7473:7483]
    assert sorted(folder.rglob("*")) == files


DATES = [
    {"prompt": "1=", "answer": "2024-01-05", "more": {"at": "2024-01-05T10:00:00Z", "all": ["2024-01-05"]}},
    {"prompt": "2=", "answer": "2024-01-06", "more": {"at": "2024-01-06 10:00", "all": []}},
]


def as_indented_json(rows, path):
    (path / "rows.json").write_text("\n" + json.dumps(rows, indent=1))
    return path / "rows.json"


def as_folder_of_gzip(rows, path):
    (path / "files").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "files" / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return path / "files"


@pytest.mark.parametrize(
    "save", [as_jsonl, as_json, as_indented_json, as_folder_of_files, as_folder_of_gzip, as_parquet, as_disk_dict]
)
def test_text_that_looks_like_a_date_stays_text(tmp_path, save):
    rows = [*DATES, DATES[0] | {"answer": None}]
    path = str(save(rows, tmp_path))
    assert load_splits(path)["train"].to_list() == rows
    assert load_splits(path)["train"].to_list() == rows  # the second time from the cache of datasets


def test_a_date_in_a_column_named_for_dates_stays_text_and_so_do_dates_before_other_text(tmp_path):
    rows = [{"prompt": "1=", "created_at": "2024-01-05", "date": "2024-01-05", "answer": "007"}] * 2
    assert load_splits(str(as_indented_json(rows, tmp_path)))["train"].to_list() == rows
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(json.dumps(DATES[0]))
    (tmp_path / "files" / "test.jsonl").write_text(json.dumps(DATES[0] | {"answer": "unknown"}))
    splits = load_splits(str(tmp_path / "files"))
    assert (splits["train"][0]["answer"], splits["test"][0]["answer"]) == ("2024-01-05", "unknown")
    # the library reads 10 MB at once, and takes the columns' types from the first of these parts
    line = json.dumps({"answer": "2024-01-05", "padding": "x" * 1000})
    (tmp_path / "large.jsonl").write_text(f"{line}\n" * 11000 + json.dumps({"answer": "unknown", "padding": ""}))
    large = load_splits(str(tmp_path / "large.jsonl"))["train"]
    assert (large[0]["answer"], large[-1]["answer"], len(large)) == ("2024-01-05", "unknown", 11001)


def test_where_no_text_looks_like_a_date_nothing_is_read_in_another_way(tmp_path):
    rows = [{"prompt": "1=", "answer": "10:30", "year": 2024, "tags": [["2024"]], "mixed": 1}, {"prompt": "2="}]
    rows[1]["mixed"] = "one"
    found = load_splits(str(as_jsonl(rows, tmp_path)))["train"].to_list()
    assert found == [rows[0], {"prompt": "2=", "answer": None, "year": None, "tags": None, "mixed": "one"}]


def numbers(*answers):
    return [{"prompt": f"{n}+1=", "answer": answer} for n, answer in enumerate(answers)]


@pytest.mark.parametrize("save", [as_jsonl, as_parquet])
def test_a_number_in_a_template_reads_as_it_was_written(attach, tmp_path, save):
    path = str(save(numbers(72, 0.5, 1000000, -3), tmp_path))
    template = "{answer}={answer:.1f}+{answer!s:>3}"
    datamodule = attach(PromptDataModule(path, prompt_template=template, validation_split="train"))
    prompts = [row["prompt"] for row in evaluation_rows(datamodule.val_dataloader())]
    assert prompts == ["72=72.0+ 72", "0.5=0.5+0.5", "1000000=1000000.0+1000000", "-3=-3.0+ -3"]


@pytest.mark.parametrize(
    ("template", "column"),
    [("{answer}=", "'answer'"), ("{more[at]}=", r"'more\[at\]'"), ("{prompt}{answer!s}", "'answer'")],
)
def test_a_null_in_a_template_is_refused_by_row_and_column(attach, tmp_path, template, column):
    rows = [*DATES, {"prompt": "3=", "answer": None, "more": {"at": None, "all": []}}]
    with pytest.raises(ValueError, match=rf"'train': row 2: prompt_template=.* asks for {column}.*null: leave the row"):
        attach(PromptDataModule(str(as_jsonl(rows, tmp_path)), prompt_template=template))


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        (ExactAnswer(), "Row 2: ExactAnswer needs a right answer, but 'answer' is null"),
        (ExactAnswer(compare="last_number"), "Row 2: ExactAnswer needs a right answer"),
        ([Format("1"), BoxedMath()], "Row 2: BoxedMath, 'answer': a right answer is needed, got None"),
    ],
)
@pytest.mark.parametrize("save", [as_jsonl, as_parquet])
@pytest.mark.parametrize("split", ["train_split", "validation_split"])
def test_a_null_where_a_reward_needs_a_value_is_refused_before_training(attach, tmp_path, grader, message, save, split):
    path = str(save(numbers(1, 2, None), tmp_path))
    settings = {"train_split": "train[:2]"} | {split: "train"}
    with pytest.raises(ValueError, match=message):
        attach(PromptDataModule(path, **settings), reward=grader)
    attach(PromptDataModule(path, **settings))  # a reward that has not said so may know what null means


def test_prompts_with_different_answers_are_told_of_once(attach, tmp_path):
    rows = [*sums(4), {"prompt": "1+1=", "answer": "3", "level": 1}, {"prompt": "1+1=", "answer": "2", "level": 1}]
    rows += [{"prompt": "2+1=", "answer": "3", "level": 7}]  # what no reward needs may differ
    path = str(as_jsonl(rows, tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        datamodule = attach(PromptDataModule(path, validation_split="train"), reward=ExactAnswer())
        datamodule.setup("fit")
    said = [str(w.message) for w in said if "different values" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith(
        "1 prompts, on 3 of the 7 rows, are there several times with different values in ['answer'"
    )


def test_a_system_prompt_goes_in_front_of_messages_that_have_none(attach, tmp_path):
    talk = [{"role": "user", "content": "1+"}, {"role": "assistant", "content": "2="}]
    path = str(as_jsonl([{"talk": talk, "answer": "3"}] * 4, tmp_path))
    datamodule = attach(PromptDataModule(path, prompt_column="talk", system_prompt="12"))
    assert train_rows(datamodule)[0]["prompt"] == [{"role": "system", "content": "12"}, *talk]
    rows = [{"talk": talk}, {"talk": [{"role": "system", "content": "1"}, *talk]}]
    path = str(as_parquet(rows, tmp_path))
    with pytest.raises(ValueError, match=r"'train': row 1 has a system message already.*system_prompt='12'.*: null"):
        attach(PromptDataModule(path, prompt_column="talk", system_prompt="12"))
