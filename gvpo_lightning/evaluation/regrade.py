"""`gvpo regrade FOLDER…`: grades saved completions again; no model is loaded and nothing is generated."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from gvpo_lightning.evaluation.records import Record, by_problem, read_records, write_records
from gvpo_lightning.evaluation.report import Run, average, write_report, write_run
from gvpo_lightning.evaluation.scores import BenchmarkScores, summarise
from gvpo_lightning.rewards import BoxedMath, Reward, compute_rewards, reward_name
from gvpo_lightning.rewards.maths import extract_answer


def regrade(folder: Path, reward: Reward) -> Run:
    """Reward a folder's completions, and write its .jsonl files and evaluation.json anew.

    Raises:
        ValueError: there are no completions.
    """
    path, found = folder / "evaluation.json", read_records(folder)
    run: Run = json.loads(path.read_text()) if path.exists() else {"name": folder.parent.name or str(folder)}
    summaries: dict[str, Any] = {}
    for name in sorted(found, key=[*run.get("benchmarks", ()), *found].index):
        records = found[name]
        grade_records(records, reward)
        problems = by_problem(records)
        complete = [record for samples in problems.values() for record in samples]
        scores = BenchmarkScores(len(complete) // len(problems))
        for samples in problems.values():
            scores.update(samples)
        summaries[name] = summarise(complete, scores, scores.compute())
        write_records(folder / f"{name}.jsonl", records)
        for part in folder.glob(f"{name}.rank*.jsonl"):  # of a run that ended early
            part.unlink()
    run |= {"benchmarks": summaries, "average": average(summaries)}
    run["settings"] = run.get("settings", {}) | {"reward": reward_name(reward)}
    write_run(folder, run)
    return run


def grade_records(records: list[Record], reward: Reward) -> None:
    """Set the records' `reward` and `answer`."""
    columns = {"problem": [r.get("problem") for r in records], "answer": [r["gold"] for r in records]}
    completions = [record["completion"] for record in records]
    values = compute_rewards(reward, [record.get("prompt") for record in records], completions, columns)
    for record, value in zip(records, values, strict=True):
        record["reward"] = None if value != value else value
        record["answer"] = extract_answer(record["completion"])


def main(args: list[str]) -> None:
    """Command line.

    Raises:
        ValueError: a folder without completions.
    """
    parser = ArgumentParser(prog="gvpo regrade", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a file with the settings below")
    parser.add_argument("folders", nargs="+", type=str, help="`evaluation` folders of `gvpo test`, one a row")
    parser.add_argument("--reward", type=Reward, default=None, help="default: gvpo_lightning.rewards.BoxedMath")
    parser.add_argument("--report", type=str, default=None, help="folder for table and plot; default: the first one")
    parser.add_argument("--reported", type=bool, default=False, help="the paper's own rows too, marked as reported")
    settings = parser.instantiate_classes(parser.parse_args(args))
    runs = [regrade(Path(folder), settings.reward or BoxedMath()) for folder in settings.folders]
    report = Path(settings.report or settings.folders[0])
    write_report(report, runs, reported=settings.reported)
    print((report / "evaluation.md").read_text())
