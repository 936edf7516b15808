"""What `make gpu-profile` and `make gpu-sanitize` run, as far as a CPU goes."""

import json
import sys

from benchmarks import profile_loss, sanitize


def test_profile_writes_a_table_and_json(tmp_path, monkeypatch):
    shape = ["--tokens", "64", "--hidden", "16", "--vocabulary", "50"]
    monkeypatch.setattr(sys, "argv", ["profile_loss", *shape, "--mode", "stash", "--results", str(tmp_path)])
    profile_loss.main()
    (path,) = tmp_path.glob("*_stash.json")
    record = json.loads(path.read_text())
    assert record["rows"][0]["ms"] >= record["rows"][-1]["ms"] >= 0
    assert 0 < sum(row["share"] for row in record["rows"]) <= 1.001
    assert "aten::" in path.with_suffix(".txt").read_text()


def test_every_path_runs_on_the_sanitizer_shapes(capsys):
    sanitize.work("cpu")
    assert sanitize.FINISHED in capsys.readouterr().out


def test_verdicts():
    clean = f"{sanitize.FINISHED}\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.verdict(clean) == (True, "no findings")
    assert sanitize.verdict(clean.replace(" 0 ", " 3 ")) == (False, "3 findings")
    hazards = f"{sanitize.FINISHED}\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert not sanitize.verdict(hazards)[0]
    assert not sanitize.verdict("Traceback (most recent call last):\nValueError: no")[0]
    assert "refused" in sanitize.verdict("========= Error: Device not supported")[1]


def test_without_the_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    assert sanitize.main() == 0
    assert "nothing was checked" in capsys.readouterr().out
