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
    assert stability.prompts_per_update([str(path) for path in paths]) == 6
    assert stability.prompts_per_update([str(paths[2])]) == 8


def test_table_and_figure_show_what_diverged():
    from matplotlib.figure import Figure

    rows = grid(lambda method, number, rate: 0.1 if rate > 2e-3 else 0.8)
    assert stability.table(rows).count("(diverged: 2)") == len(stability.COMPARED) * 3
    figure = Figure()
    stability.plot(rows, figure)
    texts = [text.get_text() for axis in figure.axes[:4] for text in axis.texts]
    assert sum(text.endswith("x") for text in texts) == pytest.approx(len(texts) / 2)
