"""The grid's claims: who diverges more often, what old rollouts cost, and where GVPO loses."""

import pytest

from benchmarks.paper import stability


def a_row(method, number, rate, accuracy, *, seed=0, log_ratio=1.0):
    at = {"accuracy": accuracy, "kl": 1.0, "length": 3.0}
    trace = [{"update": 8, "gradient_norm": 0.5, "log_ratio_max": log_ratio}]
    labels = {"task": "sums", "method": method, "updates_per_rollout": number, "learning_rate": rate}
    measured = {"start": {**at, "accuracy": 0.4}, "end": at, "evaluations": [], "trace": trace}
    return {"labels": labels, "seed": seed, "stopped": None, "skipped_updates": 0} | measured


def grid(accuracies):
    return [
        a_row(method, number, rate, accuracies(method, number, rate) + 0.01 * seed, seed=seed, log_ratio=ratio)
        for method in stability.COMPARED
        for number in stability.UPDATES_PER_ROLLOUT
        for rate in (1e-3, 1e-2)
        for seed in (0, 1)
        for ratio in [0.0 if method == "GVPO, previous" and number == 1 else 1.0]
    ]


def holds(claims, *words):
    (found,) = [claim.holds for claim in claims if all(word in claim.says for word in words)]
    return found


def test_collapses_are_counted():
    claims = stability.claims(grid(lambda method, number, rate: 0.05 if method == "GRPO" and rate > 2e-3 else 0.8))
    assert holds(claims, "GVPO, frozen diverges", "GRPO") is True
    assert holds(claims, "GVPO, frozen diverges", "PG + KL") is None
    claims = stability.claims(grid(lambda method, number, rate: 0.05 if "GVPO" in method and rate > 2e-3 else 0.8))
    assert holds(claims, "GVPO, previous diverges", "GRPO") is False
    one = stability.claims(grid(lambda method, number, rate: 0.05 if (method, number) == ("GRPO", 4) else 0.8))
    assert holds(one, "GVPO, frozen diverges", "GRPO") is None  # 4 of 12 and none: p = 0.09
    assert {claim.source for claim in one} == {"paper", "theory", "ours"}


def test_part_of_a_grid_and_stopped_runs_are_shown():
    from matplotlib.figure import Figure

    def lost(row):
        return row | {"end": None, "stopped": "update 3"} if row["labels"]["learning_rate"] > 2e-3 else row

    rows = [lost(row) for row in grid(lambda method, number, rate: 0.8)]
    assert stability.table(rows).count("n/a (diverged: 2)") == len(stability.COMPARED) * 3
    assert all(number == 1e-3 for same in stability.best_rates(rows[:12]).values() for number in rates_of(same))
    stability.plot(rows, Figure())
    for part in (rows[:1], rows[:3], [row for row in rows if row["labels"]["method"] == "GRPO"]):
        assert stability.table(part)
        assert all(claim.holds in (True, False, None) for claim in stability.claims(part))
        stability.plot(part, Figure())


def rates_of(rows):
    return [row["labels"]["learning_rate"] for row in rows]


def test_old_rollouts_are_compared_at_the_best_rate_of_each():
    def accuracies(method, number, rate):
        return 0.8 if (number == 16) == (rate < 2e-3) else 0.6  # another rate is best for old rollouts

    claims = stability.claims(grid(accuracies))
    assert all(claim.holds for claim in claims if "are as good as" in claim.says)
    claims = stability.claims(grid(lambda method, number, rate: 0.8 - 0.02 * number))
    assert not any(claim.holds for claim in claims if "are as good as" in claim.says)


def test_a_method_that_loses_anywhere_is_said_to():
    claims = stability.claims(grid(lambda method, number, rate: 0.9 if (method, number) == ("GRPO", 4) else 0.8))
    assert holds(claims, "GVPO, frozen is nowhere", "GRPO") is False
    assert holds(claims, "GVPO, frozen is nowhere", "PG + KL") is True


def test_previous_is_reinforce_where_log_ratios_are_0():
    claims = stability.claims(grid(lambda method, number, rate: 0.8))
    assert holds(claims, "no regulariser") is True


def test_updates_are_as_large_as_the_last_config_says(tmp_path):
    paths = [tmp_path / name for name in ("one.yaml", "two.yaml", "three.yaml")]
    texts = ("model: {rollout: {prompts_per_update: 4}}", "model: {rollout: {prompts_per_update: 6}}", "model: {}")
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    assert stability.prompts_per_update(tuple(str(path) for path in paths)) == 6
    paths[2].write_text("# nothing but a remark\n")
    assert stability.prompts_per_update((str(paths[2]),)) == 8


def test_table_and_figure_show_what_diverged():
    from matplotlib.figure import Figure

    rows = grid(lambda method, number, rate: 0.1 if rate > 2e-3 else 0.8)
    assert stability.table(rows).count("(diverged: 2)") == len(stability.COMPARED) * 3
    figure = Figure()
    stability.plot(rows, figure)
    texts = [text.get_text() for axis in figure.axes[:4] for text in axis.texts]
    assert sum(text.endswith("x") for text in texts) == pytest.approx(len(texts) / 2)
