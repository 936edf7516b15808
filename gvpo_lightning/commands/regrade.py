"""`gvpo regrade FOLDER…`: grades saved completions again; no model is loaded and nothing is generated."""

import json
import math
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from gvpo_lightning.evaluation.report import Run, average, write_report, write_run
from gvpo_lightning.evaluation.scores import (
    BenchmarkScores,
    Record,
    answer_extractor,
    by_problem,
    grader,
    read_records,
    reward_facts,
    summarise,
    write_records,
)
from gvpo_lightning.rewards import BoxedMath, Reward, Rewards, RewardSettings
from gvpo_lightning.rewards.protocol import wants_token_ids


def regrade(folder: Path, rewards: Rewards) -> Run:
    """Reward a folder's completions, and write its .jsonl files and evaluation.json anew.

    Raises:
        ValueError: there are no completions, not one problem has all of its own, or they have no tokens for a reward
            that wants them; several rewards.
    """
    path, found = folder / "evaluation.json", read_records(folder)
    name, reward = grader(rewards)
    if wants_token_ids(reward) and any("token_ids" not in record for part in found.values() for record in part):
        raise ValueError(f"The reward {name} wants completion_ids, but the completions in {folder} have no token_ids.")
    run: Run = json.loads(path.read_text()) if path.exists() else {"name": folder.parent.name or str(folder)}
    settings = run.get("settings", {})
    all_problems = settings.get("problems", {})
    summaries: dict[str, Any] = {}
    for name in sorted(found, key=[*run.get("benchmarks", ()), *found].index):
        records = found[name]
        grade_records(records, rewards)
        problems = by_problem(records, settings.get("benchmarks", {}).get(name, {}).get("num_samples"))
        complete = [record for samples in problems.values() for record in samples]
        if complete:
            scores = BenchmarkScores(len(complete) // len(problems), answer_extractor(reward) is not None)
            for samples in problems.values():
                scores.update(samples)
            summaries[name] = summarise(complete, scores, scores.compute(), all_problems.get(name))
        write_records(folder / f"{name}.jsonl", records)
        for part in folder.glob(f"{name}.rank*.jsonl"):  # of a run that ended early
            part.unlink()
    if not summaries:
        raise ValueError(f"No problem in {folder} has all of its completions: the run ended too early to be graded.")
    run |= {"benchmarks": summaries, "average": average(summaries, all_problems)}
    run["settings"] = settings | reward_facts(rewards)
    write_run(folder, run)
    return run


def grade_records(records: list[Record], rewards: Rewards) -> None:
    """Set the records' `reward`, without its weight, and `answer`.

    Raises:
        RewardError: the reward has failed on too many.
    """
    columns = {"problem": [r.get("problem") for r in records], "answer": [r["gold"] for r in records]}
    completions = [record["completion"] for record in records]
    name, reward = grader(rewards)
    extract = answer_extractor(reward)
    token_ids = [record["token_ids"] for record in records] if wants_token_ids(reward) else None
    rewarded, failures = rewards([record.get("prompt") for record in records], completions, columns, token_ids)
    failures.check(rewards.settings.max_failed_fraction)
    for record, found in zip(records, rewarded, strict=True):
        value = found.components[name]
        record["reward"] = None if math.isnan(value) else value
        record["answer"] = None if extract is None else extract(record["completion"])


def main(args: list[str]) -> None:
    """Command line.

    Raises:
        ValueError: a folder without completions, or not one name a folder.
    """
    parser = ArgumentParser(prog="gvpo regrade", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a file with the settings below")
    parser.add_argument("folders", nargs="+", type=str, help="`evaluation` folders of `gvpo test`, one a row")
    parser.add_argument("--reward", type=Reward, default=None, help="default: gvpo_lightning.rewards.BoxedMath")
    parser.add_argument("--names", nargs="+", type=str, default=None, help="of the rows; default: policy, checkpoint")
    parser.add_argument("--report", type=str, default=None, help="folder for table and plot; default: the first one")
    parser.add_argument("--reported", type=bool, default=False, help="the paper's own rows too, marked as reported")
    parser.add_argument("--reward_settings", type=RewardSettings, default=RewardSettings())
    settings = parser.instantiate_classes(parser.parse_args(args))
    if settings.names is not None and len(settings.names) != len(settings.folders):
        raise ValueError(f"--names must be one a folder, {len(settings.folders)}, got {settings.names}.")
    rewards = Rewards(settings.reward or BoxedMath(), settings.reward_settings)
    rewards.place("cpu", shows_progress=True)
    try:
        runs = [regrade(Path(folder), rewards) for folder in settings.folders]
    finally:
        rewards.close()
    for run, name in zip(runs, settings.names or (), strict=settings.names is not None):
        run["name"] = name
    report = Path(settings.report or settings.folders[0])
    write_report(report, runs, reported=settings.reported)
    print((report / "evaluation.md").read_text())
