"""The loss benchmark at its smallest: its rows, its error gate, its table and plot."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.loss_measure import Settings, measure
from benchmarks.loss_problem import Shape
from benchmarks.loss_providers import Provider, eager_logprobs, eager_loss, other_libraries, ours, torch_chunked
from benchmarks.recording import Recording
from benchmarks.report import END, START, table, update_readme

FIELDS = {"provider", "implementation", "mode", "N", "H", "V", "dtype", "forward_ms", "backward_ms", "total_ms"}
FIELDS |= {"floor_ms", "ratio_to_floor", "peak_extra_bytes", "error", "eager_error"}
TINY = Shape(64, 64, 50, completions=8, group_size=4)
EAGER = Provider("eager", "torch", "all logits", eager_loss, heavy=True)


def rows_of(providers, path, shape=TINY):
    recording = Recording(path, "cpu")
    measure(shape, providers, Settings("cpu", "float32", rounds=1, warm_up=0), recording)
    return recording.rows


def test_every_mode_and_the_libraries_leave_rows(tmp_path):
    rows = rows_of([EAGER, *ours("torch"), *other_libraries()], tmp_path / "loss.json")
    assert json.loads((tmp_path / "loss.json").read_text())["rows"] == rows
    assert all(row.keys() >= FIELDS for row in rows)
    for row in rows:
        timed = row["total_ms"] is not None
        assert timed == (row["note"] is None)
        assert timed or row["provider"] not in ("ours", "eager"), row
        if timed:
            assert row["floor_ms"] > 0
            assert row["peak_extra_bytes"] >= 0
    assert rows[-1]["provider"] == "eager"  # the heaviest last
    assert len(table(rows).splitlines()) == len(rows) + 2


def test_header_names_the_machine(tmp_path):
    rows_of([EAGER], tmp_path / "loss.json")
    record = json.loads((tmp_path / "loss.json").read_text())
    assert record["device"]
    assert {"torch", "python"} <= record["versions"].keys()
    assert record["date"].count("-") == 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: eager_loss(p) * 1.001,
        lambda p: eager_loss(replace(p, hidden=p.hidden * 1.001)),
        lambda p: eager_loss(p) + 0 * p.hidden.detach().sum() + (p.hidden - p.hidden.detach()).sum() * 1e-3,
        lambda p: eager_loss(p) * float("nan"),
    ],
    ids=["loss", "input", "gradient alone", "not a number"],
)
def test_wrong_provider_shows_no_speed(tmp_path, wrong):
    (row,) = rows_of([Provider("wrong", "torch", "all logits", wrong)], tmp_path / "loss.json")
    assert row["note"] == "error above its budget: no speed"
    assert row["total_ms"] is row["forward_ms"] is row["ratio_to_floor"] is row["peak_extra_bytes"] is None
    assert "no speed" in table([row])


def test_a_provider_that_cannot_run_says_why(tmp_path):
    def missing(problem):
        import no_such_library  # noqa: F401

    def failing(problem):
        raise RuntimeError("needs another device")

    providers = [Provider("a", "x", "y", missing), Provider("b", "x", "y", failing), EAGER]
    rows = rows_of(providers, tmp_path / "loss.json")
    assert rows[0]["note"] == "not installed (no_such_library)"
    assert "needs another device" in rows[1]["note"]
    assert rows[2]["total_ms"] > 0


def test_tied_head_gets_both_gradients(tmp_path):
    rows = rows_of([*ours("torch")[:2], EAGER], tmp_path / "loss.json", replace(TINY, tied=True))
    assert all(row["tied"] and row["total_ms"] > 0 for row in rows)


def test_forward_only_is_held_to_log_probs(tmp_path):
    half = Provider("half", "torch", "forward only", lambda p: eager_logprobs(p) / 2, eager_logprobs, backward=False)
    assert rows_of([half], tmp_path / "loss.json")[0]["total_ms"] is None


def test_torch_chunks_agree_with_cross_entropy(tmp_path):
    rows = rows_of([p for p in other_libraries() if p.run is torch_chunked], tmp_path / "loss.json")
    assert rows[0]["note"] is None or "AttributeError" in rows[0]["note"]  # torch before 2.12 has none


def test_command_writes_a_sweep_and_its_plot(root, tmp_path):
    output = tmp_path / "loss_cpu.json"
    shape = ["--tokens", "64", "--hidden", "64", "--vocabulary", "50", "--rounds", "1", "--warm-up", "0"]
    command = [sys.executable, "-c", WITHOUT_COMPILER, *shape, "--sweep", "tokens", "--output", str(output)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert {row["N"] for row in json.loads(output.read_text())["rows"]} == {16, 32, 64, 128}
    assert output.with_suffix(".png").stat().st_size > 1000
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}old\n{END}after\n")
    update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "On a GPU: not measured." in text
    assert "| ours (torch) | recompute |" in text
    assert "old" not in text


# the compiler alone takes longer than everything else: its row is left out, and the packages that the machines with
# a GPU lack are not there
WITHOUT_COMPILER = """
import sys
sys.modules.update(dict.fromkeys(["datasets", "jsonargparse", "lightning", "transformers"]))
from benchmarks import loss
every = loss.providers
loss.providers = lambda device: [p for p in every(device) if p.implementation != "torch.compile"]
sys.exit(loss.main())
"""
