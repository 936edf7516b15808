"""The maths suites from start to end: real problems, a small policy, what is written of it, and grading it again."""

import gc
import json
from pathlib import Path

import pytest
import torch
import yaml

from gvpo_lightning.cli import main
from gvpo_lightning.evaluation.benchmarks import Benchmark, load_problems
from gvpo_lightning.evaluation.metrics import AverageAtK, MajorityAtK, PassAtK
from gvpo_lightning.evaluation.report import REPORTED_RIGHT, REPORTED_TOTALS, markdown, reported_runs
from gvpo_lightning.evaluation.scores import by_problem, is_right, read_records, vote
from gvpo_lightning.rewards import BoxedMath
from tests.forked import run_ranks

COUNTS = {"aime24": 30, "amc": 83, "math500": 500, "minerva": 272, "olympiad_bench": 675, "gsm8k": 1319}
PAPER = {  # Table 1, in %
    "base": (14.68, 38.55, 64.00, 27.20, 30.66),
    "GRPO": (14.79, 55.42, 80.00, 41.17, 42.07),
    "Dr.GRPO": (16.56, 48.19, 81.20, 44.48, 43.40),
    "GVPO": (20.72, 62.65, 83.80, 45.95, 46.96),
}


def config(root, name) -> dict:
    return yaml.safe_load((root / "configs" / "eval" / name).read_text())["data"]["benchmarks"]


def local_suites(root) -> dict:
    """As jsonargparse lays one config over the other, key by key."""
    hub, local = config(root, "math.yaml"), config(root, "local.yaml")
    return {name: hub[name] | local[name] for name in hub}


def test_shipped_configs_have_the_same_suites(root):
    hub, local = config(root, "math.yaml"), local_suites(root)
    assert {name: suite["count"] for name, suite in local.items()} == COUNTS
    assert {name: suite["count"] for name, suite in hub.items()} == COUNTS | {"olympiad_bench": 674}
    for suites in (hub, local):
        samples = {name: suite.get("num_samples", 1) for name, suite in suites.items()}
        assert samples == dict.fromkeys(COUNTS, 1) | {"aime24": 32}
    assert len((root / "configs" / "eval" / "math.yaml").read_text().splitlines()) <= 40


def test_every_local_suite_loads_whole(root, shared_data):
    for name, suite in local_suites(root).items():
        suite["path"] = suite["path"].replace("data", str(shared_data), 1)
        rows = load_problems(name, Benchmark(**suite))
        assert len(rows) == COUNTS[name]
        assert all(isinstance(row["problem"], str) and set(row) == {"problem", "answer"} for row in rows)
    janet = load_problems("gsm8k", Benchmark(str(shared_data / "gsm_8k"), split="train[7473:]"))[0]
    assert janet["problem"].startswith("Janet’s ducks lay 16 eggs")  # the official test split's first
    assert janet["answer"] == "18"


def test_a_suite_with_another_number_of_problems_is_refused(shared_data):
    suite = Benchmark(str(shared_data / "evaluation_suite"), split="aime[:29]", count=30)
    with pytest.raises(ValueError, match=r"data.benchmarks.aime24 must have 30 problems, but 'aime\[:29\]'.* has 29"):
        load_problems("aime24", suite)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"problem": "p", "answer": None}], {}, "problem 0 has no answer"),
        ([{"problem": "p", "answer": "5"}], {"answer_column": "gold"}, "'gold' is not a column"),
        ([{"problem": "p", "answer": "5"}], {"answer_after": "#### "}, "answer_after='#### ' is not in '5'"),
        ([{"problem": "p", "answer": "5"}], {"split": "test"}, "data.benchmarks.own.split: 'test' names no split"),
    ],
)
def test_unusable_suites_are_refused(tmp_path, rows, settings, message):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        load_problems("own", Benchmark(str(path), **({"split": "train"} | settings)))


def test_hub_style_answers_lose_what_stands_before_the_mark(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "1 + 1 = 2\n#### 1,234"}) + "\n")
    suite = Benchmark(str(path), split="train", problem_column="question", answer_after="#### ")
    assert load_problems("own", suite) == [{"problem": "q", "answer": "1,234"}]


def test_reported_scores_are_whole_counts():
    """To within one in the second decimal: some are cut there rather than rounded."""
    assert {run["name"] for run in reported_runs()} == {f"{name} (reported)" for name in PAPER}
    for name, scores in PAPER.items():
        for score, right, total in zip(scores, REPORTED_RIGHT[name], REPORTED_TOTALS.values(), strict=True):
            assert abs(100 * right / total - score) < 0.011, (name, score, right, total)
            assert round(score / 100 * total) == right


@pytest.fixture
def arguments(root, shared_data, monkeypatch, tmp_path):
    """Four problems of each suite that the small policy has room for, four completions of the first suite's."""
    monkeypatch.chdir(root)
    suites = local_suites(root)
    for name, suite in suites.items():
        column = {"aime24": "aime[1:5]", "gsm8k": "train[7473:7477]"}.get(name, f"{suite['split']}[:4]")
        suite |= {"path": suite["path"].replace("data", str(shared_data), 1), "split": column, "count": 4}
    suites["aime24"] |= {"num_samples": 4}
    suites["olympiad_bench"] |= {"split": "olympiad_bench[300:304]"}
    suites["minerva"] |= {"split": "minerva[55:59]"}
    overlay = tmp_path / "few.yaml"
    overlay.write_text(
        yaml.safe_dump({"data": {"benchmarks": suites, "prompt_template": None, "batch_size": 3}}, sort_keys=False)
    )
    settings = {"default_root_dir": tmp_path, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": "no"}
    return [
        *("test", "--config", "configs/eval/math.yaml", "--config", str(overlay)),
        *(f"--trainer.{name}={value}" for name, value in settings.items()),
        "--model.policy=configs/gsm8k_tiny/model",
        "--model.generation.max_new_tokens=12",
    ]


def scores_of(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["benchmarks"]


def expected_scores(records) -> dict:
    """By the metrics themselves, from the saved completions."""
    problems = by_problem(records).values()
    found = {}
    for kind, name in ((AverageAtK, "avg@4"), (PassAtK, "pass@1"), (PassAtK, "pass@4"), (MajorityAtK, "maj@4")):
        metric = kind(int(name[-1]))
        if name != "pass@1" and len(next(iter(problems))) == 1:
            continue
        for samples in problems:
            right, votes = torch.tensor([is_right(r) for r in samples]), [vote(r["answer"]) for r in samples]
            metric.update(*((right, votes) if kind is MajorityAtK else (right,)))
        found[name] = float(metric.compute())
    return found


def test_policy_is_tested_and_graded_again(arguments, tmp_path):
    main(arguments)
    folder = tmp_path / "evaluation"
    records, scores = read_records(folder), scores_of(folder)
    assert {name: len(lines) for name, lines in records.items()} == dict.fromkeys(COUNTS, 4) | {"aime24": 16}
    assert list(scores) == list(COUNTS)
    for name, lines in records.items():
        assert expected_scores(lines).items() <= {k: v["value"] for k, v in scores[name]["metrics"].items()}.items()
        assert [line["number"] for line in lines] == sorted(line["number"] for line in lines)
        assert all(line["prompt"] == line["problem"] and 1 <= line["num_tokens"] <= 12 for line in lines)
    assert len({line["completion"] for line in records["aime24"] if line["number"] == 0}) > 1  # sampled
    run = json.loads((folder / "evaluation.json").read_text())
    assert run["settings"]["generation"]["max_new_tokens"] == 12
    assert run["settings"]["reward"]["BoxedMath"]["require_box"] is True
    assert run["settings"]["reward_settings"]["weights"] is None
    assert run["settings"]["problems"] == dict.fromkeys(COUNTS, 4)
    assert run["average"] == pytest.approx(sum(entry["score"] for entry in scores.values()) / 6)
    assert all(len(line["token_ids"]) == line["num_tokens"] for lines in records.values() for line in lines)
    table = (folder / "evaluation.md").read_text()
    assert table.splitlines()[0].startswith("|  | aime24 (avg@4) | amc (pass@1) |")
    assert (folder / "evaluation.png").stat().st_size > 10_000

    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    main(["regrade", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == before
    main(arguments)  # the same seed; what was there is kept
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}.items() <= before.items()
    assert {path.name: path.read_bytes() for path in (tmp_path / "evaluation.1").glob("*.json*")} == before


@pytest.mark.parametrize(
    "reward",
    [
        ["gvpo_lightning.rewards.BoxedMath", "gvpo_lightning.rewards.ExactAnswer"],  # with weights
        {"class_path": "gvpo_lightning.rewards.BoxedMath", "init_args": {"answer_column": "solution"}},
    ],
)
def test_training_configs_change_no_score(arguments, tmp_path, reward):
    """`math.yaml` after the config of a run that differs from it wherever scores would show it."""
    weights = [0.1] * len(reward) if isinstance(reward, list) else [0.1]
    generation = {"top_k": 5, "top_p": 0.5, "min_p": 0.2, "temperature": 0.1, "stop_strings": ["a", "e"]}
    model = {"reward": reward, "reward_settings": {"weights": weights}, "generation": generation}
    data = {"path": "nowhere", "system_prompt": "Think.", "conversational": True, "prompt_template": "{problem}!"}
    run, few = tmp_path / "run.yaml", tmp_path / "few.yaml"
    run.write_text(yaml.safe_dump({"model": model | {"policy": "configs/gsm8k_tiny/model"}, "data": data}))
    overlay = yaml.safe_load(few.read_text())
    overlay["data"]["benchmarks"] |= dict.fromkeys([name for name in COUNTS if name != "amc"])
    overlay["data"]["benchmarks"]["amc"]["count"] = 1
    overlay["data"]["benchmarks"]["amc"]["split"] = "amc[:1]"
    del overlay["data"]["prompt_template"]
    few.write_text(yaml.safe_dump(overlay))
    arguments = [a for a in arguments if not a.startswith(("--model.policy", "--model.generation"))]
    main(["test", "--config", str(run), *arguments[1:], "--model.generation.max_new_tokens=2"])
    (record,) = read_records(tmp_path / "evaluation")["amc"]
    assert record["prompt"].startswith("<|im_start|>system\nPlease reason step by step")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["settings"]
    assert list(found["reward"]) == ["BoxedMath"]
    assert found["reward"]["BoxedMath"]["answer_column"] == "answer"
    assert found["reward_settings"]["weights"] is None
    assert (found["conversational"], found["system_prompt"]) == (False, None)
    expected = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_strings": []}
    assert expected.items() <= found["generation"].items()
    assert found["policy"] == "configs/gsm8k_tiny/model"


def test_a_part_of_the_problems_is_called_that(arguments, tmp_path):
    main([*arguments, "--trainer.limit_test_batches=1"])
    run = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert list(run["benchmarks"]) == ["aime24"]
    assert (run["benchmarks"]["aime24"]["problems"], run["benchmarks"]["aime24"]["all_problems"]) == (3, 4)
    assert run["average"] is None
    row = (tmp_path / "evaluation" / "evaluation.md").read_text().splitlines()[2]
    assert row.endswith("3 of 4 problems |  |")
    reward = "--reward=tests.evaluation.test_suites.as_long_as_can_be"  # asked for the tokens that were sampled
    main(["regrade", str(tmp_path / "evaluation"), reward])
    records = read_records(tmp_path / "evaluation")["aime24"]
    assert [bool(r["reward"]) for r in records] == [r["truncated"] for r in records]
    again = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert again["average"] is None
    assert again["benchmarks"]["aime24"]["all_problems"] == 4


class LooksNowhere(BoxedMath):
    """A reward whose own code is broken where answers are looked for, or that gives what is no list."""

    def __init__(self, gives_no_list: bool) -> None:
        super().__init__()
        self.in_process, self.gives_no_list = True, gives_no_list
        if not gives_no_list:
            self.extract_answer = lambda completion: completion[1_000_000]

    def __call__(self, prompts, completions, **columns):
        return {0: 1.0} if self.gives_no_list else [1.0] * len(completions)


@pytest.mark.parametrize(("gives_no_list", "error"), [(True, "must return one entry"), (False, "out of range")])
def test_what_was_sampled_is_there_whatever_fails_after_it(arguments, tmp_path, gives_no_list, error):
    reward = {
        "class_path": "tests.evaluation.test_suites.LooksNowhere",
        "init_args": {"gives_no_list": gives_no_list},
    }
    overlay = tmp_path / "broken.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"reward": reward}}))
    with pytest.raises((SystemExit, IndexError, ValueError)) as raised:
        main([*arguments, "--config", str(overlay)])
    (records,) = read_records(tmp_path / "evaluation").values()
    assert len(records) == 3 * 4  # the batch at hand
    assert all(record["token_ids"] for record in records)
    assert {record["reward"] for record in records} == ({None} if gives_no_list else {1.0})
    assert error in str(raised.value) or isinstance(raised.value, SystemExit)
    del raised
    gc.collect()  # what the run has left open changes no mode of torch's, whenever it is closed
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def as_long_as_can_be(prompts, completions, completion_ids, **columns):
    return [float(len(ids) == 12) for ids in completion_ids]


def test_several_rewards_are_refused_before_the_model_is_loaded(arguments, capsys):
    rewards = "[gvpo_lightning.rewards.BoxedMath,gvpo_lightning.rewards.ExactAnswer]"
    with pytest.raises(SystemExit):
        main([*arguments, f"--model.reward={rewards}"])
    assert "exactly one reward, which is beyond 0.5 for right completions, got ['BoxedMath'" in capsys.readouterr().err


def test_two_ranks_test_every_problem_once(arguments, root, tmp_path):
    several = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1"]
    arguments = [a.replace("configs/", f"{root}/configs/") for a in arguments]
    run_ranks(tmp_path, 2, main, [*arguments, *several])
    folder = tmp_path / "evaluation"
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".jsonl") == sorted(
        f"{name}.jsonl" for name in COUNTS
    )
    records, scores = read_records(folder), scores_of(folder)
    for name, lines in records.items():
        samples = 4 if name == "aime24" else 1
        places = [(line["number"], line["sample"]) for line in lines]
        assert places == [(number, sample) for number in range(4) for sample in range(samples)]
        assert expected_scores(lines).items() <= {k: v["value"] for k, v in scores[name]["metrics"].items()}.items()


def test_reported_rows_have_the_papers_average():
    table = markdown(reported_runs())
    assert "| GVPO (reported) | 20.73 | 62.65 | 83.80 | 45.96 | 46.96 | 52.02 |" in table
