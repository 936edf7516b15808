"""Runs that are killed at random moments and started again end bitwise as if nothing had happened.

With replay, demonstrations and a moving reference; the second pass over the prompts begins within the second rollout.
"""

import random
import signal

import pytest

from tests.checkpointing.survivor import PHASES, assert_the_same_as

SECONDS = {"rollout": 0.04, "reward": 0.02, "training": 0.05, "checkpoint": 0.03}  # that a phase takes, about


def strike(crew, phase: str, victims: tuple[int, ...], chance: random.Random) -> str | None:
    """Kill some ranks at a random moment of a phase; the phase they really were in, None where the run had ended."""
    if not crew.wait_for(phase, chance.randint(1, 3)):
        assert set(crew.end()) == {0}, crew.errors()
        return None
    killed_in = phase
    if crew.reports.poll(chance.uniform(0, SECONDS[phase])):  # a phase may be over sooner, and the next one entered
        killed_in = crew.next_report() or phase
    crew.signal(signal.SIGKILL, *victims)
    codes = crew.end()
    assert all(codes[rank] == -signal.SIGKILL for rank in victims) or set(codes) == {0}
    assert all(code in (0, 1, -signal.SIGKILL) for code in codes)
    return killed_in if codes[victims[0]] else None


def go_on_to_the_end(start, strategy: str) -> None:
    last = start(strategy)
    assert set(last.end()) == {0}, last.errors()


def test_a_run_that_is_killed_in_every_phase_goes_on_bitwise(crew, through, tmp_path):
    chance = random.Random(0)
    for phase in PHASES:
        assert strike(crew(), phase, (0,), chance)
    go_on_to_the_end(crew, "single")
    assert_the_same_as(through("single"), tmp_path / "run", ranks=1)


def test_two_ranks_one_and_then_both_killed_go_on_bitwise(crew, through, tmp_path):
    chance = random.Random(0)
    assert strike(crew("ddp", watch=1), "training", (1,), chance)
    assert strike(crew("ddp"), "checkpoint", (0, 1), chance)
    go_on_to_the_end(crew, "ddp")
    assert_the_same_as(through("ddp"), tmp_path / "run", ranks=2)


# strategy, ranks that are killed, kills: 64 in all, 16 in each phase
CASES = [
    ("single", (0,), 20),
    ("ddp", (0,), 12),
    ("ddp", (1,), 12),
    ("ddp", (0, 1), 12),
    ("fsdp2", (1,), 4),
    ("fsdp2", (0, 1), 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "victims", "kills"), CASES, ids=str)
def test_kills_all_over_a_run(crew, through, tmp_path, strategy, victims, kills):
    chance = random.Random(f"{strategy} {victims}")
    killed = dict.fromkeys(PHASES, 0)
    run, ranks = tmp_path / "run", 1 if strategy == "single" else 2
    for number in range(10 * kills):
        rarest = min(killed, key=lambda phase: killed[phase])
        if killed[rarest] * len(PHASES) >= kills:
            break
        hit = strike(crew(strategy, watch=victims[0]), rarest, victims, chance)
        if hit is not None:
            killed[hit] += 1
        else:
            assert_the_same_as(through(strategy), run, ranks)
            run.rename(tmp_path / f"ended{number}")
    assert min(killed.values()) * len(PHASES) >= kills, killed
    go_on_to_the_end(crew, strategy)
    assert_the_same_as(through(strategy), run, ranks)
    assert not list((run / "checkpoints").glob(".*"))
