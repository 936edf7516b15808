import pytest

from benchmarks.paper.group_size import GROUP_SIZES, PROMPTS_HELD, SAMPLES_HELD, claims, rollout_settings, table


def row(task: str, design: str, method: str, size: int, seed: int, accuracy: float) -> dict:
    labels = {"task": task, "design": design, "method": method, "group_size": size}
    return {"labels": labels, "seed": seed, "stopped": None, "start": {"accuracy": 0.3}, "end": {"accuracy": accuracy}}


def rows(task: str, design: str, of: dict[str, dict[int, float]]) -> list[dict]:
    """Three seeds, which have their noise in common."""
    return [
        row(task, design, method, size, seed, accuracy + 0.1 * seed)
        for method, sizes in of.items()
        for size, accuracy in sizes.items()
        for seed in range(3)
    ]


def test_equal_samples_are_equal_and_equal_prompts_grow():
    found = [rollout_settings(None, SAMPLES_HELD, size) for size in GROUP_SIZES]
    completions = {s["model.rollout.group_size"] * s["model.rollout.prompts_per_update"] for s in found}
    assert completions == {128}
    assert all(s["model.rollout.prompts_per_rollout"] == 4 * s["model.rollout.prompts_per_update"] for s in found)
    assert {rollout_settings(None, PROMPTS_HELD, k)["model.rollout.prompts_per_update"] for k in GROUP_SIZES} == {4}


@pytest.mark.parametrize(
    ("design", "size", "prompts", "accumulate"),
    [
        (PROMPTS_HELD, 8, 32, 16),
        (PROMPTS_HELD, 64, 32, 128),
        (PROMPTS_HELD, 2, 32, 4),
        (SAMPLES_HELD, 64, 4, 16),
        (SAMPLES_HELD, 2, 128, 16),
    ],
)
def test_a_config_keeps_its_prompts_or_its_samples_and_its_micro_batches(tmp_path, design, size, prompts, accumulate):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("trainer: {accumulate_grad_batches: 2}\nmodel: {rollout: {prompts_per_update: 32}}")
    own.write_text(
        "trainer: {accumulate_grad_batches: 16}\nmodel: {rollout: {group_size: 8, prompts_per_rollout: 128}}"
    )
    found = rollout_settings((str(base), str(own)), design, size)
    assert found == {
        "model.rollout.group_size": size,
        "model.rollout.prompts_per_update": prompts,
        "model.rollout.prompts_per_rollout": 4 * prompts,
        "trainer.accumulate_grad_batches": accumulate,
    }


def test_claims_agree_contradict_or_are_undecided():
    rising = {2: 0.4, 4: 0.5, 8: 0.6}
    good = rows("sums", PROMPTS_HELD, {"GVPO": rising, "GRPO": {k: v - 0.05 for k, v in rising.items()}})
    assert [claim.holds for claim in claims(good)] == [True, True]
    assert [claim.source for claim in claims(good)] == ["paper", "paper"]
    worse_at_one = rows("sums", PROMPTS_HELD, {"GVPO": rising, "GRPO": rising | {4: 0.55}})
    assert claims(worse_at_one)[0].holds is False
    equal = rows("sums", PROMPTS_HELD, {"GVPO": rising, "GRPO": rising})
    assert claims(equal)[0].holds is not True
    falling = rows("sums", PROMPTS_HELD, {"GVPO": rising | {8: 0.3}})
    assert claims(falling)[-1].holds is False


def test_rising_is_one_trend():
    dips = rows("sums", PROMPTS_HELD, {"GVPO": {2: 0.4, 4: 0.39, 8: 0.6}})
    (claim,) = claims(dips)
    assert claim.holds is True
    assert "by 0.100 ± 0.000 for each doubling" in claim.measured
    assert claims(dips[:1]) == []  # one size
    without = [row | {"end": None, "stopped": "update 3"} if row["seed"] == 0 else row for row in dips]
    assert "(2 of 3 seeds)" in claims(without)[0].measured
    assert "(stopped: 3)" in table(without)


def test_one_size_of_many_contradicts_only_at_the_level_of_all():
    accuracies = [row("sums", PROMPTS_HELD, "GVPO", k, seed, 0.5) for k in GROUP_SIZES for seed in range(3)]
    # at one size GRPO is better by 0.1 with an interval of 0.086 at 95%: more than that at 99%
    theirs = [
        row("sums", PROMPTS_HELD, "GRPO", k, seed, 0.6 + 0.0346 * (seed - 1) if k == 4 else 0.4)
        for k in GROUP_SIZES
        for seed in range(3)
    ]
    assert claims(accuracies + theirs)[0].holds is None
    only = [r for r in accuracies + theirs if r["labels"]["group_size"] == 4]
    assert claims(only)[0].holds is False


def test_small_against_large_is_the_largest_against_the_smallest_group():
    large = rows("sums", PROMPTS_HELD, {"GVPO": {2: 0.6, 64: 0.9}})
    small = rows("sums_small", PROMPTS_HELD, {"GVPO": {2: 0.2, 64: 0.65}})
    claim = claims(large + small)[-1]
    assert claim.holds is True
    assert "k = 64 of the small policy" in claim.measured
    assert claims(large + rows("sums_small", PROMPTS_HELD, {"GVPO": {2: 0.2, 64: 0.5}}))[-1].holds is False
