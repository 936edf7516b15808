"""Saved completions are graded again, also those of runs that ended early."""

import json
import shutil
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from gvpo_lightning.cli import main
from gvpo_lightning.evaluation.scores import append_records, is_right, read_records, vote
from tests.evaluation.test_suites import scores_of


@pytest.fixture
def recorded(tmp_path) -> Path:
    """Two problems with four completions each, of which three and one are right."""
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    texts = {0: ["1/2", "0.5", "\\frac12", "2"], 1: ["7", "8", "8", None]}
    golds = {0: "\\frac{1}{2}", 1: ["7.0", "seven"]}
    with (folder / "own.jsonl").open("w") as file:
        for number, answers in texts.items():
            for sample, answer in enumerate(answers):
                completion = "no idea" if answer is None else f"It is \\boxed{{{answer}}}."
                record = {"number": number, "sample": sample, "completion": completion, "gold": golds[number]}
                record |= {"num_tokens": 5, "truncated": False, "reward": None, "answer": None}
                file.write(json.dumps(record) + "\n")
    return folder


def test_recorded_completions_have_the_scores_that_are_known(recorded):
    main(["regrade", str(recorded)])
    own = scores_of(recorded)["own"]
    assert (own["right"], own["completions"], own["problems"], own["without_answer"]) == (4, 8, 2, 1)
    values = {name: metric["value"] for name, metric in own["metrics"].items()}
    # the first problem's votes: 0.5 twice as a number? no: 1/2, 0.5, \frac12 and 2 are four texts; the second's: 8
    expected = {"avg@4": 0.5, "pass@1": 0.5, "pass@2": (1 + 0.5) / 2, "pass@4": 1.0}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert values["maj@4"] == pytest.approx((3 / 4 + 0) / 2)


def test_a_run_that_ended_early_is_graded_as_far_as_it_got(recorded):
    lines = (recorded / "own.jsonl").read_text().splitlines(keepends=True)
    (recorded / "own.jsonl").write_text("".join(lines[:4]))
    (recorded / "own.rank1.jsonl").write_text("".join(lines[4:7]) + lines[7][:20])  # the last line was cut off
    main(["regrade", str(recorded)])
    own = scores_of(recorded)["own"]
    assert (own["problems"], own["right"], own["score"]) == (1, 3, 0.75)
    assert len(read_records(recorded)["own"]) == 7  # nothing that was saved is lost
    assert not (recorded / "own.rank1.jsonl").exists()


def test_a_run_that_ended_while_ranks_were_put_together_counts_nothing_twice(recorded):
    main(["regrade", str(recorded)])
    expected = scores_of(recorded)
    lines = (recorded / "own.jsonl").read_text().splitlines(keepends=True)
    (recorded / "own.rank1.jsonl").write_text("".join(lines[4:]))
    main(["regrade", str(recorded)])
    assert scores_of(recorded) == expected
    assert (recorded / "own.jsonl").read_text() == "".join(lines)


def test_a_run_that_ended_early_knows_what_it_was_to_do(recorded):
    settings = {"benchmarks": {"own": {"num_samples": 4}}, "problems": {"own": 2, "more": 7}}
    (recorded / "evaluation.json").write_text(json.dumps({"name": "run", "settings": settings}))
    lines = (recorded / "own.jsonl").read_text().splitlines(keepends=True)
    (recorded / "own.jsonl").write_text("".join(lines[:6]))
    main(["regrade", str(recorded)])
    run = json.loads((recorded / "evaluation.json").read_text())
    assert run["benchmarks"]["own"]["score"] == 0.75
    assert run["average"] is None
    assert "1 of 2 problems" in (recorded / "evaluation.md").read_text()
    (recorded / "own.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(SystemExit):  # none has all four
        main(["regrade", str(recorded)])
    assert len(read_records(recorded)["own"]) == 3


def test_weights_do_not_change_what_is_right(recorded):
    main(["regrade", str(recorded), "--reward_settings.weights=[0.2]"])
    assert scores_of(recorded)["own"]["right"] == 4
    assert {record["reward"] for record in read_records(recorded)["own"]} == {0.0, 1.0}


def test_completions_without_tokens_are_refused_to_rewards_that_want_them(recorded, capsys):
    before = (recorded / "own.jsonl").read_text()
    with pytest.raises(SystemExit):
        main(["regrade", str(recorded), "--reward=tests.evaluation.test_suites.as_long_as_can_be"])
    assert "as_long_as_can_be wants completion_ids, but the completions in" in capsys.readouterr().err
    assert (recorded / "own.jsonl").read_text() == before


@pytest.mark.parametrize(("answer", "counted"), [("", None), ("\\text{ }", None), ("0.50", 0.5), ("nan", "nan")])
def test_votes(answer, counted):
    assert vote(answer) == counted


def test_rows_are_named_by_the_policy_and_its_checkpoint_or_as_wanted(recorded, tmp_path):
    other = tmp_path / "other" / "evaluation"
    shutil.copytree(recorded, other)
    lines = (other / "own.jsonl").read_text().splitlines(keepends=True)
    (other / "own.jsonl").write_text(lines[0] + lines[4])  # one sample a problem
    for folder, name in ((recorded, "policy"), (other, "policy, last.ckpt")):
        (folder / "evaluation.json").write_text(json.dumps({"name": name, "settings": {"problems": {"own": 2}}}))
    for names in (["policy", "policy, last.ckpt"], ["base", "trained"]):
        main(["regrade", str(recorded), str(other), *(["--names", *names] if "base" in names else [])])
        header, _, *rows = (recorded / "evaluation.md").read_text().split("\n\n")[0].splitlines()
        assert header == "|  | own | average |"  # the metric differs
        assert [row.split("|")[1].strip() for row in rows] == names
        assert [row.split("|")[2].strip().rpartition(", ")[2] for row in rows] == ["avg@4", "pass@1"]
    with pytest.raises(SystemExit):
        main(["regrade", str(recorded), "--names", "a", "b"])


def test_another_reward_and_several_runs_in_one_table(recorded, tmp_path):
    other = tmp_path / "other" / "evaluation"
    shutil.copytree(recorded, other)
    reward = "--reward={class_path: gvpo_lightning.rewards.ExactAnswer, init_args: {compare: last_number}}"
    main(["regrade", str(recorded), str(other), "--report", str(tmp_path / "both"), "--reported=true", reward])
    # the last number of the first answer is 2, of the second 7
    right = [r["completion"] for r in read_records(recorded)["own"] if is_right(r)]
    assert right == [f"It is \\boxed{{{answer}}}." for answer in ("1/2", "2", "7")]
    own = scores_of(recorded)["own"]
    assert own["without_answer"] is None  # what the answer is, this reward does not say
    assert not any(name.startswith("maj") for name in own["metrics"])
    table = (tmp_path / "both" / "evaluation.md").read_text()
    names = [line.split("|")[1].strip() for line in table.split("\n\n")[0].splitlines()[2:]]
    assert names == ["base (reported)", "GRPO (reported)", "Dr.GRPO (reported)", "GVPO (reported)", "run", "other"]


def test_failures_of_the_grader_are_wrong_and_counted(recorded):
    reward = "--reward=tests.evaluation.test_regrade.fails_on_halves"
    main(["regrade", str(recorded), reward])
    own = scores_of(recorded)["own"]
    assert (own["right"], own["ungraded"], own["completions"]) == (7, 1, 8)


def fails_on_halves(prompts, completions, **columns):
    return [None if "0.5" in completion else 1.0 for completion in completions]


def test_no_completions_to_grade_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["regrade", str(tmp_path)])
    assert error.value.code == 2
    assert "gvpo: error: There are no completions in" in capsys.readouterr().err


def test_right_answers_that_json_does_not_have_are_recorded_as_text_and_graded_again(tmp_path):
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    golds = [date(2024, 1, 5), b"7", Decimal("72.00"), 72.0, datetime(2024, 1, 5, 10)]
    texts = ["2024-01-05", "7", "72", "72", "2024-01-05 10:00:00"]
    facts = {"sample": 0, "prompt": "p", "num_tokens": 5, "truncated": False, "reward": None, "answer": None}
    append_records(
        folder / "own.jsonl",
        [facts | {"number": n, "gold": g, "completion": t} for n, (g, t) in enumerate(zip(golds, texts, strict=True))],
    )
    main(["regrade", str(folder), "--reward=gvpo_lightning.rewards.ExactAnswer"])
    assert scores_of(folder)["own"]["right"] == 5
    assert [record["gold"] for record in read_records(folder)["own"]] == [*texts[:3], 72.0, texts[4]]
