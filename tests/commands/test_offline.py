"""`gvpo predict`, `gvpo reference` and `gvpo fit` on what they wrote; what does not fit together is refused."""

import json

import pytest
import torch
from datasets import Dataset

from gvpo_lightning.cli import main
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.prepare import load_policy
from gvpo_lightning.rollout.rollout import Rollout
from tests.error_budget import assert_within
from tests.update_budget import scores_budget


@pytest.fixture
def gvpo(arithmetic, tmp_path):
    """Runs a subcommand with the shipped arithmetic config, cut short, in a folder of the test's own."""

    def run(subcommand, *arguments, overlay=None):
        overlays = [] if overlay is None else ["--config", str(arithmetic.parent / overlay)]
        main(
            [
                subcommand,
                "--config",
                str(arithmetic.parent / "arithmetic.yaml"),
                *overlays,
                f"--model.policy={arithmetic / 'model'}",
                f"--data.path={arithmetic / 'sums'}",
                "--data.train_split=train[:16]",
                "--data.test_split=train[:16]",
                "--data.validation_split=validation[:4]",
                f"--trainer.default_root_dir={tmp_path}",
                "--trainer.enable_progress_bar=false",
                *arguments,
            ]
        )

    return run


@pytest.fixture
def offline(gvpo, tmp_path):
    """`offline(subcommand, …)` with cached log-probs of recorded completions, which are there."""
    gvpo("predict")
    path = tmp_path / "predictions.jsonl"

    def run(subcommand, *arguments, file=path):
        gvpo(subcommand, f"--model.sources.file.path={file}", *arguments, overlay="arithmetic_offline.yaml")

    run.path = path
    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SHORT = ["--trainer.max_epochs=1", "--model.rollout.prompts_per_rollout=8"]


def test_predict_reference_fit(offline, tmp_path, tokenizer):
    recorded = rows_of(offline.path)
    offline("reference")
    cached = rows_of(offline.path)
    assert [{k: v for k, v in row.items() if k in old} for row, old in zip(cached, recorded, strict=True)] == recorded
    identity = cached[0]["reference"]
    assert set(identity) == {"model", "weights", "tokenizer", "dtype", "precision", "temperature"}
    assert not list(tmp_path.glob("*.partial"))
    offline("fit", *SHORT)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def test_cached_log_probs_are_those_that_the_run_would_compute(offline, monkeypatch):
    offline("reference")
    seen = []
    original = Rollout.group_shapes
    monkeypatch.setattr(Rollout, "group_shapes", lambda self: seen.append(self) or original(self))
    offline("fit", *SHORT)
    for rollout in seen:
        policy = load_policy(rows_of(offline.path)[0]["reference"]["model"])
        expected = score(policy, rollout.batch, Scoring(1.0), batch_size=64)
        assert_within(rollout.batch.reference_logprobs, expected, scores_budget(policy, rollout.batch))


def test_fit_on_parquet_is_fit_on_jsonl(offline, tmp_path):
    offline("reference")
    weights = []
    for kind in ("jsonl", "parquet"):
        file = tmp_path / f"copy.{kind}"
        dataset = Dataset.from_json(str(offline.path))
        dataset.to_parquet(str(file)) if kind == "parquet" else file.write_bytes(offline.path.read_bytes())
        offline("fit", *SHORT, f"--trainer.default_root_dir={tmp_path / kind}", file=file)
        weights.append((tmp_path / kind / "export" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_reference_fills_parquet_too_and_goes_on_where_it_was_stopped(offline, tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    Dataset.from_json(str(offline.path)).to_parquet(str(file))
    from gvpo_lightning.commands import reference as reference_cache

    calls = []
    original = reference_cache._scored

    def stops_at_the_tenth(row, *others):
        calls.append(row["prompt"])
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(row, *others)

    monkeypatch.setattr(reference_cache, "_scored", stops_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        offline("reference", file=file)
    partial = tmp_path / "rows.parquet.partial"
    assert len(partial.read_text().splitlines()) == 9
    with partial.open("a") as lines:
        lines.write('{"prompt": "cut off in the mid')
    offline("reference", file=file)
    assert len(calls) == 10 + 7  # nine were kept
    assert not partial.exists()
    filled = Dataset.from_parquet(str(file))
    assert filled["completions"][:] == [row["completions"] for row in rows_of(offline.path)]
    assert all(filled["reference_logprobs"][:])


def fails(capsys, run, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_fit_without_the_cache_says_how_to_fill_it(offline, capsys):
    assert "run `gvpo reference` with this config" in fails(capsys, offline, "fit", *SHORT)


@pytest.mark.parametrize("key", ["weights", "tokenizer", "dtype", "precision", "temperature"])
def test_a_cache_that_something_else_made_is_refused(offline, capsys, key):
    offline("reference")
    rows = rows_of(offline.path)
    rows[3]["reference"][key] = 2.0 if key == "temperature" else "other"
    offline.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = fails(capsys, offline, "fit", *SHORT)
    assert f"were made by {rows[0]['reference']['model']!r} with {{'{key}'" in message
    assert "but this run's reference is" in message


def test_a_cache_of_another_temperature_or_policy_is_refused(offline, capsys, tmp_path, arithmetic):
    offline("reference")
    assert "'temperature': 1.0" in fails(capsys, offline, "fit", *SHORT, "--model.temperature=0.5")
    policy = load_policy(str(arithmetic / "model"))
    with torch.no_grad():
        next(policy.parameters())[0] += 1.0
    policy.save_pretrained(tmp_path / "other")
    tokenizer = f"--model.tokenizer={arithmetic / 'model'}"
    other = f"--model.policy={tmp_path / 'other'}"
    assert "'weights'" in fails(capsys, offline, "fit", *SHORT, other, tokenizer)
    model = f"--model.reference={{kind: cached, model: {arithmetic / 'model'}}}"
    offline("fit", *SHORT, other, tokenizer, model)  # another policy against the recorded reference


def test_a_part_of_a_file_does_not_replace_it(offline, capsys, tmp_path):
    split = "--model.sources.file.split=train[:3]"
    assert "which would lose the rest: give --output FILE" in fails(capsys, offline, "reference", split)
    offline("reference", split, f"--output={tmp_path / 'part.jsonl'}")
    assert len(rows_of(tmp_path / "part.jsonl")) == 3
    assert len(rows_of(offline.path)) == 16


def test_what_is_predicted_without_a_reward_can_be_read_again(offline, gvpo):
    gvpo("predict", "--model.reward=null", "--model.sources={policy: 0, file: {path: unused.jsonl}}")
    rows = rows_of(offline.path)
    assert all("rewards" not in row for row in rows)
    assert all(ids for row in rows for ids in row["token_ids"])
    offline("reference")
    offline("fit", *SHORT)  # the reward is asked now


def test_reference_without_a_file_or_with_a_folder_is_refused(gvpo, offline, capsys, tmp_path):
    assert "set model.sources.file.path" in fails(capsys, gvpo, "reference")
    Dataset.from_json(str(offline.path)).save_to_disk(str(tmp_path / "folder"))
    run = lambda *a: offline(*a, file=tmp_path / "folder")  # noqa: E731
    assert "give --output FILE" in fails(capsys, run, "reference")
    run("reference", f"--output={tmp_path / 'out.jsonl'}")
    assert all(row["reference_logprobs"] for row in rows_of(tmp_path / "out.jsonl"))
