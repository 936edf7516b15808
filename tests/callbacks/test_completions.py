import copy
import io
import json
import math
from datetime import date, datetime
from decimal import Decimal

import lightning as L
import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from gvpo_lightning.callbacks import CompletionsTable, PredictionWriter
from gvpo_lightning.callbacks.completions import COLUMNS, markdown_table, render_table, table_rows
from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rewards.settings import RewardSettings
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.sources.offline import OfflineFile

TALK = [{"role": "system", "content": "short"}, {"role": "user", "content": "a question"}]
AWKWARD = ["[red]not red[/red]", "two\nlines", "a | b", ":dog:", "[/]", "back\\", "[link=x]\\[b]", "", "é 数 \u2028"]


@pytest.fixture
def rollout():
    size = len(AWKWARD)
    batch = collate_completions([[5]] * size, [[3]] * size, [False] * size, [0] * 4 + [1] * (size - 4), 0)
    batch.rewards = torch.tensor([math.nan, 1.0, -0.5] + [0.0] * (size - 3))
    return Rollout(0, batch, ["[bold]prompt", TALK], AWKWARD, ["policy"] * (size - 1) + ["file.a teacher"], [1] * size)


def on_screen(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_table(rows, "title"))
    return console.export_text()


def test_rows_are_the_first_completions(rollout):
    rows = table_rows(rollout, 6)
    assert len(rows) == 6
    assert len(table_rows(rollout, 100)) == len(AWKWARD)
    assert rows[0] == {
        "group": 0,
        "prompt": "[bold]prompt",
        "completion": "[red]not red[/red]",
        "source": "policy",
        "reward": None,
    }
    assert [row["reward"] for row in rows[1:3]] == [1.0, -0.5]
    assert rows[4] == {
        "group": 1,
        "prompt": "a question",
        "completion": "[/]",
        "source": "policy",
        "reward": 0.0,
    }
    assert [row["source"] for row in table_rows(rollout, 100)[-2:]] == ["policy", "file.a teacher"]
    json.dumps(rows)


@pytest.mark.parametrize("text", [text for text in AWKWARD if text and "\n" not in text and "\u2028" not in text])
def test_text_reaches_the_screen_as_it_is(text):
    shown = on_screen([{"group": 0, "prompt": text, "completion": f"x{text}", "source": text, "reward": 1.0}])
    assert f" {text} " in shown
    assert f"x{text} " in shown


def test_the_screen_shows_a_whole_rollout(rollout):
    shown = on_screen(table_rows(rollout, 100))
    for name in (*COLUMNS, "title", "two", "lines", "a question", "None", "file.a teacher"):
        assert name in shown
    shown = on_screen([{"group": 0, "prompt": "p", "completion": "c" * 10_000, "source": "p", "reward": 1.0}])
    assert shown.count("c") < 400


def test_a_groups_prompt_is_shown_once(rollout):
    shown = on_screen(table_rows(rollout, 100))
    assert shown.count("[bold]prompt") == shown.count("a question") == 1


def test_markdown_has_a_line_a_row_and_a_cell_a_column(rollout):
    lines = markdown_table(table_rows(rollout, 100)).split("\n")
    assert len(lines) == 2 + len(AWKWARD)
    for line in lines:
        assert line.replace("\\|", "").count("|") == len(COLUMNS) + 1
    assert lines[2] == "| 0 | [bold]prompt | [red]not red[/red] | policy | None |"
    assert lines[3] == "| 0 | [bold]prompt | two lines | policy | 1.0 |"
    assert lines[4] == "| 0 | [bold]prompt | a \\| b | policy | -0.5 |"


def predictor(folder) -> L.Trainer:
    """A quiet Trainer that writes its predictions into the folder."""
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[PredictionWriter()],
    )


def reward_by_position(prompts, completions, level, **columns):
    """Some completions have none."""
    return [None if number == 0 else number + 0.5 for number, value in zip(range(len(completions)), level, strict=True)]


def test_predictions_are_valid_json_lines(tiny_policy, tokenizer, tmp_path):
    rows = [{"prompt": f"{n}+1=", "level": n} for n in range(5)]
    module = GVPOModule(
        tiny_policy(),
        reward_by_position,
        tokenizer,
        rollout=RolloutSettings(group_size=3),
        generation=GenerationSettings(max_new_tokens=4),
    )
    folder = tmp_path / "run"
    trainer = predictor(folder)
    for _ in range(2):  # a second run starts its file anew, and draws the same
        predictions = trainer.predict(module, DataLoader(rows, batch_size=2, collate_fn=list))
        written = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
        assert written == [prediction for batch in predictions for prediction in batch]
        assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
        assert [row["rewards"] for row in written] == [[None, 1.5, 2.5], [3.5, 4.5, 5.5]] * 2 + [[None, 1.5, 2.5]]
        assert [row["level"] for row in written] == [row["level"] for row in rows]
        for row in written:
            assert set(row) == {"prompt", "level", "completions", "rewards", "token_ids", "truncated", "sources"}
            assert len(row["completions"]) == len(row["token_ids"]) == len(row["truncated"]) == 3
            assert row["sources"] == ["policy"] * 3
        assert "NaN" not in (folder / "predictions.jsonl").read_text()


def no_list(prompts, completions, **columns):
    """What is no answer of a reward's."""
    return dict.fromkeys(range(len(completions)), 1.0)


def test_what_was_sampled_is_written_before_a_rewards_mistake_ends_the_run(make_module, tmp_path):
    module = make_module(reward=no_list, reward_settings=RewardSettings(num_workers=0))
    trainer = predictor(tmp_path)
    rows = [{"prompt": f"{n}+1="} for n in range(5)]
    for call in (trainer.predict, trainer.validate):
        with pytest.raises(ValueError, match=r"The reward no_list must return one entry a completion, .* got dict"):
            call(module, DataLoader(rows, batch_size=2, collate_fn=list))
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in written] == ["0+1=", "1+1="]  # the batch at hand
    assert all(row["completions"] and row["token_ids"] and "rewards" not in row for row in written)


ODD = {
    "at": datetime(2024, 1, 5, 10, 30),
    "on": date(2024, 1, 5),
    "raw": b"7\xff",
    "price": Decimal("7.50"),
    "share": float("nan"),
    "nested": {"all": [datetime(2024, 1, 5), None, 0.1]},
    "array": np.array([1.5, 2.0], dtype=np.float32),
    "number": np.int64(3),
    "half": "half a pair \ud800",
}


def test_what_json_does_not_have_is_written_as_text_and_can_be_read_again(make_module, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "1+1=", "sent": datetime(2024, 1, 5, 10)}]
    rows = [{"prompt": talk} | ODD, {"prompt": "2+1="} | ODD]
    trainer = predictor(tmp_path)
    (found,) = trainer.predict(make_module(tokenizer=tokenizer), DataLoader(rows, batch_size=2, collate_fn=list))
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    written = {
        "at": "2024-01-05 10:30:00",
        "on": "2024-01-05",
        "raw": "7\\xff",
        "price": "7.50",
        "share": None,
        "nested": {"all": ["2024-01-05 00:00:00", None, 0.1]},
        "array": [1.5, 2.0],
        "number": 3,
        "half": "half a pair ?",
    }
    assert {name: value for name, value in json.loads(lines[1]).items() if name in ODD} == written
    for number, line in enumerate(lines):  # one by one: a column of the library's has one type
        (tmp_path / f"{number}.jsonl").write_text(line + "\n")
        file = OfflineFile(str(tmp_path / f"{number}.jsonl"), "train", tokenizer, len(tokenizer))
        assert rows[number]["prompt"] in file
        assert [c.text for c in file.completions(rows[number]["prompt"], [1])] == found[number]["completions"]
        read = file.rows[0]
        assert {name: value for name, value in read.items() if name in ODD} == written


def test_a_run_on_messages_with_dates_can_be_saved_and_goes_on(make_module, tokenizer, fit, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = {"role": "user", "sent": datetime(2024, 1, 5, 10)}
    rows = [{"prompt": [talk | {"content": f"{n}+1="}]} | ODD for n in range(8)]
    trainer = fit(make_module(tokenizer=tokenizer), rows=rows, max_steps=1, callbacks=[CompletionsTable(1)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")  # with the rollout, of which there is one more update
    module = make_module(tokenizer=tokenizer)
    fit(module, rows=rows, max_steps=3, ckpt_path=tmp_path / "half.ckpt", callbacks=[CompletionsTable(1)])
    assert module.run.num_updates == 3
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 24
