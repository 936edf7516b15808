"""`gvpo regrade FOLDER…`: grades saved completions again; no model is loaded and nothing is generated."""

import json
import math
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from gvpo_lightning.evaluation.records import Record, by_problem, read_records, write_records
from gvpo_lightning.evaluation.report import Run, average, write_report, write_run
from gvpo_lightning.evaluation.scores import BenchmarkScores, summarise
from gvpo_lightning.rewards import BoxedMath, Reward, Rewards, RewardSettings
from gvpo_lightning.rewards.maths import extract_answer


def regrade(folder: Path, rewards: Rewards) -> Run:
    """Reward a folder's completions, and write its .jsonl files and evaluation.json anew.

    Raises:
        ValueError: there are no completions.
    """
    path, found = folder / "evaluation.json", read_records(folder)
    run: Run = json.loads(path.read_text()) if path.exists() else {"name": folder.parent.name or str(folder)}
    summaries: dict[str, Any] = {}
    for name in sorted(found, key=[*run.get("benchmarks", ()), *found].index):
        records = found[name]
        grade_records(records, rewards)
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
    run["settings"] = run.get("settings", {}) | {"reward": list(rewards.functions)}
    write_run(folder, run)
    return run


def grade_records(records: list[Record], rewards: Rewards) -> None:
    """Set the records' `reward` and `answer`.

    Raises:
        RewardError: the reward has failed on too many.
    """
    columns = {"problem": [r.get("problem") for r in records], "answer": [r["gold"] for r in records]}
    completions = [record["completion"] for record in records]
    rewarded, failures = rewards([record.get("prompt") for record in records], completions, columns)
    failures.check(rewards.settings.max_failed_fraction)
    for record, found in zip(records, rewarded, strict=True):
        record["reward"] = None if math.isnan(found.total) else found.total
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
    parser.add_argument("--reward_settings", type=RewardSettings, default=RewardSettings())
    settings = parser.instantiate_classes(parser.parse_args(args))
    rewards = Rewards(settings.reward or BoxedMath(), settings.reward_settings)
    rewards.shows_progress = True
    try:
        runs = [regrade(Path(folder), rewards) for folder in settings.folders]
    finally:
        rewards.close()
    report = Path(settings.report or settings.folders[0])
    write_report(report, runs, reported=settings.reported)
    print((report / "evaluation.md").read_text())
