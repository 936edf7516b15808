"""evaluation.json, a table like the paper's Table 1, and a plot."""

import json
from pathlib import Path
from typing import Any

from gvpo_lightning.atomic import appearing, write_whole

Run = dict[str, Any]  # what evaluation.json holds: name, benchmarks, average, settings, versions

# what the paper's Table 1 reports of Qwen2.5-Math-7B: right completions, of 32 for each AIME24 problem
REPORTED_TOTALS = {"aime24": 960, "amc": 83, "math500": 500, "minerva": 272, "olympiad_bench": 675}
REPORTED_RIGHT = {
    "base": (141, 32, 320, 74, 207),
    "GRPO": (142, 46, 400, 112, 284),
    "Dr.GRPO": (159, 40, 406, 121, 293),
    "GVPO": (199, 52, 419, 125, 317),
}


def reported_runs() -> list[Run]:
    """The paper's rows, marked as such; without intervals, which it does not give."""
    runs = []
    for name, right in REPORTED_RIGHT.items():
        benchmarks = {
            suite: {"score": count / total, "right": count, "completions": total, "metric": "reported"}
            for (suite, total), count in zip(REPORTED_TOTALS.items(), right, strict=True)
        }
        runs.append({"name": f"{name} (reported)", "benchmarks": benchmarks, "average": mean_score(benchmarks)})
    return runs


def mean_score(benchmarks: dict[str, dict[str, Any]]) -> float:
    """The mean of the benchmarks' scores, each counting once."""
    return sum(entry["score"] for entry in benchmarks.values()) / len(benchmarks)


def average(benchmarks: dict[str, dict[str, Any]], problems: dict[str, int]) -> float | None:
    """The mean of the scores; None unless all the problems that each benchmark has are there."""
    found = {name: entry["problems"] for name, entry in benchmarks.items()}
    return mean_score(benchmarks) if found == problems else None


def write_report(folder: Path, runs: list[Run], *, reported: bool = False) -> None:
    """evaluation.md and evaluation.png of some runs, after the paper's own rows where `reported` asks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*reported_runs(), *runs] if reported else runs
    write_whole(folder / "evaluation.md", markdown(rows))
    plot(folder / "evaluation.png", rows)


def write_run(folder: Path, run: Run) -> None:
    """evaluation.json of one run."""
    write_whole(folder / "evaluation.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def suites(runs: list[Run]) -> list[str]:
    """Every benchmark's name, in the order of the first run that has it."""
    return list(dict.fromkeys(name for run in runs for name in run["benchmarks"]))


def markdown(runs: list[Run]) -> str:
    """Percentages with 95% intervals, and how many completions are right.

    A benchmark's metric is in its column's head, or where runs have different ones in the cells.
    """
    names = suites(runs)
    metrics = {name: {run["benchmarks"][name]["metric"] for run in runs if name in run["benchmarks"]} for name in names}
    metrics = {name: found - {"reported"} or found for name, found in metrics.items()}
    heads = [f"{name} ({next(iter(found))})" if len(found) == 1 else name for name, found in metrics.items()]
    header = ["", *heads, "average"]
    scores, counts = [header, ["---", *["---:"] * (len(names) + 1)]], []
    for run in runs:
        cells = [_score_cell(_entry(run, name), with_metric=len(metrics[name]) > 1) for name in names]
        # an average over fewer benchmarks would not compare
        is_whole = run["average"] is not None and all(name in run["benchmarks"] for name in names)
        mean = f"{100 * run['average']:.2f}" if is_whole else ""
        scores.append([run["name"], *cells, mean])
        for name in names:
            if "tokens_mean" in (entry := _entry(run, name)):  # not of what is only reported
                counted = [entry[key] for key in ("ungraded", "without_answer", "truncated")]
                numbers = ["" if number is None else f"{number:,}" for number in counted]
                right = f"{entry['right']:,} of {entry['completions']:,}"
                counts.append([run["name"], name, right, *numbers, f"{entry['tokens_mean']:,.0f}"])
    details = ["run", "benchmark", "right", "ungraded", "without an answer", "truncated", "tokens, mean"]
    tables = [scores, [details, ["---", "---", *["---:"] * 5], *counts]] if counts else [scores]
    return "\n\n".join("\n".join("| " + " | ".join(row) + " |" for row in rows) for rows in tables) + "\n"


def _entry(run: Run, name: str) -> dict[str, Any]:
    return run["benchmarks"].get(name, {})


def _score_cell(entry: dict[str, Any], *, with_metric: bool) -> str:
    if not entry:
        return ""
    text = f"{100 * entry['score']:.2f}"
    if "interval" in entry:
        low, high = entry["interval"]
        text += f" ({100 * low:.1f}–{100 * high:.1f})"
    if with_metric:
        text += f", {entry['metric']}"
    if "problems" in entry and entry["problems"] != entry["all_problems"]:
        text += f", {entry['problems']} of {entry['all_problems'] or '?'} problems"
    return text


def plot(path: Path, runs: list[Run]) -> None:
    """Scores with intervals, and beside them pass@k and maj@k where there are several completions a problem."""
    from matplotlib.figure import Figure

    curves = [
        (run["name"], name, kind, points)
        for run in runs
        for name in run["benchmarks"]
        for kind in ("pass", "maj")
        if len(points := _curve(run["benchmarks"][name], kind)) > 1
    ]
    names = suites(runs)
    figure = Figure(figsize=(11 if curves else 7, 4), layout="constrained")
    panels = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        for position, name in enumerate(names):
            if entry := _entry(run, name):
                place = position + (number - (len(runs) - 1) / 2) * width
                label = run["name"] if name == next(iter(run["benchmarks"])) else None
                panels[0].bar(place, 100 * entry["score"], width, color=f"C{number % 10}", label=label)
                if "interval" in entry:
                    ends = [[100 * abs(entry["score"] - end)] for end in entry["interval"]]
                    panels[0].errorbar(place, 100 * entry["score"], ends, color="black", capsize=2)
    panels[0].set_xticks(range(len(names)), names, rotation=20)
    panels[0].set_ylabel("% right, with 95% intervals")
    panels[0].legend(fontsize="small")
    for run_name, name, kind, points in curves:
        values = [100 * value for _, value in points]
        panels[1].plot([k for k, _ in points], values, marker="o", label=f"{run_name}, {name}, {kind}@k")
    if curves:
        panels[1].set_xscale("log", base=2)
        panels[1].set_xlabel("k")
        panels[1].legend(fontsize="small")
    with appearing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _curve(entry: dict[str, Any], kind: str) -> list[tuple[int, float]]:
    metrics = entry.get("metrics", {})
    return [(int(name.split("@")[1]), value["value"]) for name, value in metrics.items() if name.startswith(kind)]
