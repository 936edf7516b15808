"""Log-ratios by length against what they are at the optimum, and the claims that follow."""

import pytest
import torch

from benchmarks.paper import lengths
from benchmarks.paper.by_length import describe_part, parts_of_prompts

GROUPS = torch.arange(6).repeat_interleave(8)


def test_optimum_separates_by_one_over_beta_without_noise():
    beta, rewards = 0.1, (torch.arange(48) % 3 == 0).double()
    log_z = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = describe_part(rewards / beta - log_z[GROUPS], torch.zeros(48), rewards, GROUPS)
    assert found == pytest.approx({"separation": 10.0, "noise": 0.0, "residual_rms": 0.0}, abs=1e-6)


def test_noise_is_that_of_equally_right_completions():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(500).repeat_interleave(8)
    rewards = torch.randint(0, 2, (4000,), generator=generator).double()
    log_ratios = 7 * rewards + 3 * torch.randn(4000, dtype=torch.float64, generator=generator) + groups
    found = describe_part(log_ratios, torch.zeros(4000), rewards, groups)
    assert found["noise"] == pytest.approx(3.0, rel=0.05)
    assert found["separation"] == pytest.approx(7.0, abs=0.3)


def test_prompts_without_both_separate_nothing():
    found = describe_part(torch.zeros(48), torch.zeros(48), torch.ones(48), GROUPS)
    assert found["separation"] is None
    assert found["noise"] == 0.0


def test_parts_are_by_length_and_of_equal_size():
    means = torch.tensor([50, 10, 30, 20, 60, 40])
    parts = parts_of_prompts(means[GROUPS] + torch.tensor([-1, 1]).repeat(24), GROUPS, 6, 3)
    assert parts.tolist() == [2, 0, 1, 0, 2, 1]


def rows_of(methods):
    """Runs of 2 seeds; `methods`: accuracy, separation and noise of the three parts, by method."""
    return [
        {
            "labels": {"task": "chains", "method": method},
            "seed": seed,
            "stopped": None,
            "settings": {"model.beta": 0.1},
            "start": {"by_length": [part(10.0 * (n + 1), 0.3, 0.0, 0.0) for n in range(3)]},
            "end": {"by_length": [part(10.0 * (n + 1), *numbers) for n, numbers in enumerate(parts)]},
        }
        for method, parts in methods.items()
        for seed in (0, 1)
    ]


def part(length, accuracy, separation, noise):
    residual = {"residual_rms": noise / 10, "noise": noise, "separation": separation}
    return {"length": length, "length_now": length, "accuracy": accuracy} | residual


def test_claims_are_about_the_longest_third():
    usual = [(0.9, 10.0, 1.0), (0.8, 9.5, 2.0), (0.5, 9.0, 4.0)]
    better = [(0.2, 10.0, 1.0), (0.2, 9.5, 2.0), (0.7, 9.0, 4.0)]
    rows = rows_of({lengths.USUAL: usual, "GVPO, beta 0.01": better, "GRPO": better, "Dr.GRPO": usual})
    claims = {claim.says: claim.holds for claim in lengths.claims(rows)}
    for words, holds in (
        ("noise of the log-ratio is larger", True),
        ("GVPO, beta 0.01 is better than beta 0.1", True),
        (f"{lengths.USUAL} is at most 0.02 of accuracy worse than GRPO", False),
        (f"{lengths.USUAL} is at most 0.02 of accuracy worse than Dr.GRPO", True),
        ("chosen on these runs) is at most 0.02 of accuracy worse than GRPO", True),
    ):
        (found,) = [value for says, value in claims.items() if words in says]
        assert found is holds, words


def test_optimum_is_beside_the_separation_and_further_with_an_exponent():
    usual = [(0.9, 10.0, 1.0), (0.8, 9.5, 2.0), (0.5, 4.0, 4.0)]
    rows = rows_of({lengths.USUAL: usual, "GVPO, beta 0.1, exponent 1": usual, "GRPO": usual})
    for row in rows[2:4]:
        row["settings"] = lengths.VARIANTS["GVPO, beta 0.1, exponent 1"]
    lines = lengths.table(rows).splitlines()[2:]
    assert [line.split("|")[7].strip() for line in lines] == ["10"] * 3 + ["100", "200", "300"] + [""] * 3
    claims = {claim.says: claim for claim in lengths.claims(rows)}
    (helped,) = [claim for says, claim in claims.items() if "exponent 1 is better than beta" in says]
    assert "as small a pull as beta 0.0033" in helped.measured
    assert {claim.source for claim in claims.values()} == {"theory", "ours"}


def test_thirds_without_a_separation_and_runs_without_an_end_are_shown():
    from matplotlib.figure import Figure

    usual = [(0.9, 10.0, 1.0), (0.8, None, 2.0), (0.5, 4.0, 4.0)]
    rows = rows_of({lengths.USUAL: usual, "GRPO": usual})
    rows[0] |= {"end": None, "stopped": "update 7"}
    assert "n/a" in lengths.table(rows)
    assert "(stopped: 1)" in lengths.table(rows)
    assert all(claim.holds is None for claim in lengths.claims(rows))
    lengths.plot(rows, Figure())


def test_a_best_that_was_chosen_is_said_to_be():
    usual, better = [(0.5, 9.0, 1.0)] * 3, [(0.7, 9.0, 1.0)] * 3
    rows = rows_of({lengths.USUAL: usual, "GVPO, beta 0.01": better, "GRPO": usual})
    says = [claim.says for claim in lengths.claims(rows) if "worse than GRPO" in claim.says]
    assert ["chosen on these runs" in text for text in says] == [False, True]
