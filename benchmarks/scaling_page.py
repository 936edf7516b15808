"""The tables of docs/scaling.md, from what `benchmarks.scaling` has estimated."""

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
START, END = "<!-- estimated: python -m benchmarks.scaling -->\n", "<!-- end of estimated -->"
GIB, GB = 2**30, 1e9
ROOM = 0.9  # of a GPU's memory; the rest is for the CUDA context, NCCL and the allocator's gaps
MOVED = ("weights, forward", "weights, backward", "gradients", "rollout", "reference", "activations (TP)")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gib(value: float) -> str:
    """For a table."""
    return f"{value / GIB:,.1f}"


def peaks(row: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the rollout and of the largest other phase."""
    totals = {name: sum(terms.values()) for name, terms in row["phases"].items()}
    return totals.pop("rollout"), max(totals.values())


def fits(peak: int, hardware: dict[str, Any]) -> str:
    """The smallest card that holds so much, in its share of `ROOM`."""
    cards = (name for name, card in hardware.items() if peak <= ROOM * card["memory"])
    return next(cards, "no card").removesuffix(" SXM")


def memory_table(ways: dict[str, Any], hardware: dict[str, Any]) -> str:
    """GiB a GPU: what is always there, what the two kinds of phases add, and the cards that fits."""
    header = ["way", "parameters", "gradients", "optimizer", "whole weights: rollout, training", "activations, head"]
    header += ["cache, sampling", "peak: rollout, training", "fits on: rollout, training", "host: reference, loading"]
    rows = []
    for way, row in ways.items():
        rollout, host, both = row["phases"]["rollout"], row["host"], peaks(row)
        training = [terms for name, terms in row["phases"].items() if name != "rollout"]
        whole = max(terms.get("whole weights", 0) for terms in training)
        work = max(terms.get("activations", 0) + terms.get("head", 0) for terms in training)
        gradients = max(terms["gradients"] for terms in training)
        cells = [way, gib(rollout["parameters"]), gib(gradients), gib(rollout["optimizer"])]
        cells += [f"{gib(rollout['whole weights'])}, {gib(whole)}", gib(work)]
        cells += [gib(rollout["key-value cache"] + rollout["activations"]), ", ".join(map(gib, both))]
        cells += [", ".join(fits(peak, hardware) for peak in both)]
        copies = host.get("reference", 0) + host.get("policy while scoring", 0)
        rows.append([*cells, f"{gib(copies)}, {gib(host['loading'])}"])
    return table(header, rows)


def traffic_table(ways: dict[str, Any]) -> str:
    """GB into one GPU in an update, by collective."""
    rows = []
    for way, row in ways.items():
        moved, between = dict.fromkeys(MOVED, 0), 0
        for call in row["traffic"]:
            name = call["what"] if call["phase"] == "train" else call["phase"]
            moved["activations (TP)" if call["what"] == "activations" else name] += call["moved"]
            between += call["between_nodes"]
        values = [*moved.values(), sum(moved.values()), between]
        rows.append([way, *(f"{value / GB:,.1f}" if value else "0" for value in values), f"{row['wire_seconds']:.1f}"])
    return table(["way", *MOVED, "all", "of it between machines", "seconds on the wire"], rows)


def time_table(ways: dict[str, Any], hardware: dict[str, Any]) -> str:
    """Seconds an update on H100s, split, of the ways that a card holds."""
    rows = []
    for way, row in ways.items():
        seconds, engine = dict(row["seconds"]), row["engine_seconds"]
        in_process, training = (fits(peak, hardware) != "no card" for peak in peaks(row))
        if not training:
            continue
        generate = seconds.pop("rollout")
        rest = sum(seconds.values())
        own = [f"{generate:.1f}", f"{generate + rest:.1f}"] if in_process else ["does not fit", ""]
        cells = [way, own[0], *(f"{value:.1f}" for value in engine.values())]
        cells += [*(f"{value:.1f}" for value in seconds.values()), own[1]]
        rows.append([*cells, f"{engine['H100 SXM'] + rest:.1f}"])
    header = ["way", "rollout: `generate`", "vLLM", "vLLM on H200", "reference", "train", "communication not hidden"]
    return table([*header, "update: `generate`", "vLLM"], rows)


def turning_points(record: dict[str, Any]) -> str:
    """Where another way is better, as a list."""
    lines = [line for plan in record["plans"] for line in _plan_lines(plan, record["hardware"])]
    tokens = [f"{value:,.0f} {where}" for where, value in record["break_even_tokens"].items()]
    lines.append(f"FSDP's traffic hides behind matmuls where a micro-batch has more tokens than {', '.join(tokens)}.")
    return "\n".join(f"- {line}" for line in lines)


def _plan_lines(plan: dict[str, Any], hardware: dict[str, Any]) -> list[str]:
    """Of one model: engines, tensor parallelism, more GPUs."""
    points, sizes, ways = plan["turning_points"], plan["sizes"], plan["ways"]
    model = plan["name"].split(" on ")[0]
    parallel = next(way for way in ways if way.startswith("TP"))
    one, other = ways["FSDP2"], ways[parallel]
    (rollout, training), (other_rollout, other_training) = peaks(one), peaks(other)
    rest, other_rest = (sum(w["seconds"].values()) - w["seconds"]["rollout"] for w in (one, other))
    launch = 1e3 * sizes["num_layers"] * hardware["H100 SXM"]["generate_layer"]
    parts = points["engine_gpus"]
    return [
        f"**{model}, vLLM**: `generate` is assumed to take {launch:.0f} ms a token for launches alone, so below "
        f"{points['engine_completions']:,.0f} completions a rollout and GPU it is more than half of an FSDP2 update. "
        f"An engine would hold the model on {parts} GPU{'s' if parts > 1 else ''}; FSDP2 gathers all of it on each, "
        f"{gib(rollout)} GiB with the rest of the rollout, which fits on {fits(rollout, hardware)}.",
        f"**{model}, {parallel}**: peaks of {gib(other_rollout)} GiB in rollouts, {gib(other_training)} in training, "
        f"against {gib(rollout)} and {gib(training)} of FSDP2; an update takes {other_rest:.1f} s beside its rollout, "
        f"against {rest:.1f}.",
        f"**{model}, more GPUs**: FSDP2 training with one group a micro-batch takes {points['fewest_gpus']:,.0f} H100s "
        "or more.",
    ]


def sections(record: dict[str, Any]) -> str:
    """Everything between the page's markers, as Markdown."""
    parts = []
    for plan in record["plans"]:
        work, ways = plan["workload"], plan["ways"]
        parts.append(
            f"### {plan['name']}\n\n{plan['sizes']['parameters'] / GB:.1f} billion parameters. "
            f"{work['prompts_per_update'] * work['group_size']} completions an update, "
            f"{work['prompts_per_rollout'] // work['prompts_per_update']} updates a rollout, prompts of "
            f"{work['prompt_tokens']} and completions of {work['completion_tokens']} tokens, micro-batches of "
            f"{ways['FSDP2']['micro_batch']} completions."
        )
        parts += ["Memory, GiB a GPU (host memory: a machine):", memory_table(ways, record["hardware"])]
        parts += ["Received by a GPU in an update, GB:", traffic_table(ways)]
        parts += ["Seconds an update, on H100s:", time_table(ways, record["hardware"])]
    return "\n\n".join([*parts, "### Where to switch", turning_points(record)])


def updated_page(page: str, record: dict[str, Any]) -> str:
    """The page with what stands between its markers made anew."""
    before, rest = page.split(START)
    return before + START + "\n" + sections(record) + "\n\n" + END + rest.split(END)[1]
