"""The paper's experiments: a cell of each is run again, small; their pages say what their numbers say."""

import json
from dataclasses import replace

import pytest
import yaml

from benchmarks.paper import cells, experiment, page, tables
from benchmarks.paper.cells import Cell, run_cell
from benchmarks.paper.experiment import PAGE_RESULTS, perform
from benchmarks.paper.options import Options
from benchmarks.paper.page import EXPERIMENTS
from benchmarks.paper.tables import Claim, decide, decide_below, estimate, paired_difference

MEASURED = {"accuracy", "sampled_reward", "kl", "entropy", "length", "truncated"}


@pytest.fixture
def in_repository(monkeypatch, root):
    monkeypatch.chdir(root)


class Found(Exception):
    """Carries an experiment's first cells."""


def first_cell(name: str, options: Options) -> Cell:
    def execute(asked):
        raise Found(asked[0])

    with pytest.raises(Found) as caught:
        EXPERIMENTS[name].run(options, execute)
    return caught.value.args[0]


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_cell_runs_again(name, tmp_path):
    cell = first_cell(name, Options(tmp_path, seeds=(0,), updates=4))
    cell = replace(cell, meter=cell.meter | {"completions": 2, "evaluations": 0})
    row = run_cell(cell)
    assert row["start"].keys() >= MEASURED
    assert row["end"].keys() >= MEASURED
    assert row["trace"][-1]["update"] == 4
    assert row["trace"][-1]["gradient_norm"] > 0
    assert row["end"] != row["start"]
    recorded = PAGE_RESULTS / f"{name}.json"
    record = json.loads(recorded.read_text())
    known = [other for other in record["rows"] if other["labels"] == cell.labels]
    assert known, "the recorded experiment has other cells than the code"
    assert row["start"]["accuracy"] == pytest.approx(known[0]["start"]["accuracy"], abs=0.15)
    assert set(cell.configs) <= record["configs"].keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_shown_is_what_was_measured(name):
    record = page.read(PAGE_RESULTS / f"{name}.json")
    assert record is not None
    chosen = EXPERIMENTS[name]
    assert (PAGE_RESULTS / f"{name}.md").read_text() == chosen.table(record["rows"]) + "\n"
    assert [Claim(**claim) for claim in record["claims"]] == chosen.claims(record["rows"])
    assert record["claims"]
    assert (PAGE_RESULTS / f"{name}.png").stat().st_size > 10_000
    assert record["commit"]
    assert len({row["key"] for row in record["rows"]}) == len(record["rows"])


def test_page_is_generated(tmp_path):
    page.write_page(PAGE_RESULTS, tmp_path / "results.md")
    assert page.PAGE.read_text() == (tmp_path / "results.md").read_text()


def test_page_says_what_was_not_measured(tmp_path):
    page.write_page(tmp_path, tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text().count("Not measured") == len(EXPERIMENTS)


def two_cells(options, execute):
    execute(
        [
            options.cell(options.configs, {"beta": beta}, {"model.beta": beta}, 0, updates=4, learning_rate=1e-3)
            for beta in (0.1, 0.2)
        ]
    )


@pytest.fixture
def small(root, tmp_path):
    """Options of a user's own run, of two updates, with much that an experiment's cells can't use."""
    config = yaml.safe_load((root / "benchmarks/paper/tasks/sums.yaml").read_text())
    config["model"]["policy"] = str(root / config["model"]["policy"])
    config["data"]["path"] = str(root / config["data"]["path"])
    config["trainer"] |= {"max_steps": 2, "logger": True, "enable_checkpointing": True}
    config["trainer"]["callbacks"] = [
        {"class_path": "gvpo_lightning.callbacks.RunCheckpoint"},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    ]
    config["model"] |= {"objective": {"kind": "grpo", "clip": 0.3}, "sources": {"replay": {"count": 4}}}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    return Options(tmp_path, (str(path),))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_results_are_kept_cell_by_cell_and_taken_up_again(jobs, small, tmp_path, monkeypatch):
    chosen = experiment.Experiment(
        "own", "Own", "", two_cells, lambda rows: f"{len(rows)} rows", lambda rows: [], lambda rows, figure: None
    )
    output = tmp_path / "results" / "own"
    output.parent.mkdir()
    rows = perform(chosen, small, output, jobs, resume=False)
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["rows"] == rows
    assert [row["labels"] for row in rows] == [{"beta": 0.1}, {"beta": 0.2}]
    assert [row["trace"][-1]["update"] for row in rows] == [2, 2]  # the config's own number
    assert record["configs"][small.configs[0]]["model"]["rollout"]["group_size"] == 8
    assert output.with_suffix(".md").read_text() == "2 rows\n"
    assert all(row["trace"][-1]["residual_rms"] > 0 for row in rows)
    kept = record["rows"][0] | {"marked": True}
    output.with_suffix(".json").write_text(json.dumps(record | {"rows": [kept, record["rows"][1]]}))
    monkeypatch.setattr(cells, "run_cell", lambda cell: pytest.fail("nothing is missing"))
    assert perform(chosen, small, output, jobs=1, resume=True)[0]["marked"]


def test_an_experiment_sets_aside_the_objective_and_the_sources_of_a_config(small):
    settings = {
        "model.objective": {"kind": "gvpo", "variance_term": False},
        "model.sources": {"demonstrations": {"column": "answer", "count": 1}},
    }
    row = run_cell(small.cell(small.configs, {}, settings, 0, updates=2, learning_rate=None))
    assert "replayed" not in row["trace"][-1]


def test_a_mistake_in_the_settings_is_shown(small, tmp_path):
    cell = replace(
        small.cell(small.configs, {"k": 1}, {"model.rollout.group_size": 1}, 0, updates=2, learning_rate=None)
    )
    with pytest.raises(RuntimeError, match="group_size must be at least 2"):
        run_cell(cell)


def test_grid_must_be_given_for_a_run_of_ones_own(small):
    assert Options(small.folder).grid((1.0, 2.0)) == (1.0, 2.0)
    with pytest.raises(ValueError, match="--learning-rates"):
        small.grid((1.0, 2.0))


def test_intervals_and_decisions():
    value = estimate([1.0, 2.0, 3.0])
    assert (value.mean, value.half) == (2.0, pytest.approx(4.302653 / 3**0.5))
    assert estimate([5.0]).half is None
    assert (decide(estimate([1.0, 1.1])), decide(estimate([-1.0, -1.1])), decide(estimate([-1.0, 1.0]))) == (
        True,
        False,
        None,
    )
    assert decide_below(estimate([0.01, 0.011]), 0.05)
    assert decide_below(estimate([0.0, 0.1]), 0.05) is None
    rows = [{"seed": seed, "end": {"accuracy": 0.5 + 0.1 * seed}} for seed in range(3)]
    worse = [{"seed": row["seed"], "end": {"accuracy": row["end"]["accuracy"] - 0.2}} for row in reversed(rows)]
    difference = paired_difference(rows, worse, tables.end("accuracy"))
    assert difference.mean == pytest.approx(0.2)
    assert difference.half == pytest.approx(0.0, abs=1e-12)
