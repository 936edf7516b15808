"""Benchmarks where the policy is sharded: no problem twice, none forgotten, on uneven numbers of them."""

import json

import pytest

from gvpo_lightning.evaluation.scores import read_records
from tests.distributed.train_script import STRATEGIES
from tests.evaluation.strategies_script import SUMS, main
from tests.forked import run_ranks

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp2", "tp")]


@pytest.mark.parametrize("name", ["fsdp2_tp", *SLOW])
def test_every_problem_is_counted_once(tmp_path, arithmetic, name):
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    world = STRATEGIES[name]()[1]
    run_ranks(tmp_path, world, main, str(arithmetic / "model"), tmp_path, name)
    benchmarks = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["benchmarks"]
    logged = [json.loads((tmp_path / f"logged{rank}.json").read_text()) for rank in range(world)]
    assert all(values == logged[0] for values in logged)
    for suite in ("sums", "more"):
        records = read_records(tmp_path / "evaluation")[suite]
        assert [(r["number"], r["sample"]) for r in records] == [(n, s) for n in range(5) for s in range(3)]
        right = sum(record["reward"] for record in records)
        assert (benchmarks[suite]["right"], benchmarks[suite]["completions"]) == (right, 15)
        assert benchmarks[suite]["score"] == pytest.approx(right / 15, abs=1e-12)
        assert logged[0][f"test/{suite}/avg@3"] == pytest.approx(right / 15, abs=1e-6)
    assert sum(entry["right"] for entry in benchmarks.values()) > 0  # or nothing was counted
    assert sorted(path.name for path in (tmp_path / "evaluation").glob("*.jsonl")) == ["more.jsonl", "sums.jsonl"]


def test_fsdp1_is_refused(tmp_path, arithmetic):
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    with pytest.raises(AssertionError, match="Ranks have different numbers of a benchmark's problems"):
        run_ranks(tmp_path, 2, main, str(arithmetic / "model"), tmp_path, "fsdp1")
