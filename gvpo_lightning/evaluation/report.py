"""evaluation.json, a table like the paper's Table 1, and a plot."""

import json
from pathlib import Path
from typing import Any

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
        runs.append({"name": f"{name} (reported)", "benchmarks": benchmarks, "average": average(benchmarks)})
    return runs


def average(benchmarks: dict[str, dict[str, Any]]) -> float:
    """The mean of the benchmarks' scores, each counting once."""
    return sum(entry["score"] for entry in benchmarks.values()) / len(benchmarks)


def write_report(folder: Path, runs: list[Run], *, reported: bool = False) -> None:
    """evaluation.md and evaluation.png of some runs, after the paper's own rows where `reported` asks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*reported_runs(), *runs] if reported else runs
    (folder / "evaluation.md").write_text(markdown(rows), encoding="utf-8")
    plot(folder / "evaluation.png", rows)


def write_run(folder: Path, run: Run) -> None:
    """evaluation.json of one run."""
    (folder / "evaluation.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def suites(runs: list[Run]) -> list[str]:
    """Every benchmark's name, in the order of the first run that has it."""
    return list(dict.fromkeys(name for run in runs for name in run["benchmarks"]))


def markdown(runs: list[Run]) -> str:
    """Percentages with 95% intervals, and how many completions are right."""
    names = suites(runs)
    metrics = {name: next(m for run in reversed(runs) if (m := _entry(run, name).get("metric"))) for name in names}
    header = ["", *(f"{name} ({metrics[name]})" for name in names), "average"]
    scores, counts = [header, ["---", *["---:"] * (len(names) + 1)]], []
    for run in runs:
        cells = [_score_cell(_entry(run, name)) for name in names]
        # an average over fewer benchmarks would not compare
        mean = f"{100 * run['average']:.2f}" if all(name in run["benchmarks"] for name in names) else ""
        scores.append([run["name"], *cells, mean])
        for name in names:
            if "tokens_mean" in (entry := _entry(run, name)):  # not of what is only reported
                numbers = [f"{entry[key]:,}" for key in ("ungraded", "without_answer", "truncated")]
                right = f"{entry['right']:,} of {entry['completions']:,}"
                counts.append([run["name"], name, right, *numbers, f"{entry['tokens_mean']:,.0f}"])
    details = ["run", "benchmark", "right", "ungraded", "without an answer", "truncated", "tokens, mean"]
    tables = [scores, [details, ["---", "---", *["---:"] * 5], *counts]] if counts else [scores]
    return "\n\n".join("\n".join("| " + " | ".join(row) + " |" for row in rows) for rows in tables) + "\n"


def _entry(run: Run, name: str) -> dict[str, Any]:
    return run["benchmarks"].get(name, {})


def _score_cell(entry: dict[str, Any]) -> str:
    if not entry:
        return ""
    text = f"{100 * entry['score']:.2f}"
    if "interval" in entry:
        low, high = entry["interval"]
        text += f" ({100 * low:.1f}–{100 * high:.1f})"
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
    figure.savefig(path, dpi=120)


def _curve(entry: dict[str, Any], kind: str) -> list[tuple[int, float]]:
    metrics = entry.get("metrics", {})
    return [(int(name.split("@")[1]), value["value"]) for name, value in metrics.items() if name.startswith(kind)]
