"""Errors within training name where they came, and which of them another rank is to blame for."""

import pytest


def test_a_rank_that_is_late_ends_the_others_with_an_error_that_names_the_step(crew):
    """Rank 1's second reward takes longer than a collective operation may: rank 0 does not wait for it."""
    run = crew("ddp", timeout=15.0, sleep=1)  # which also is how long the ranks may start apart
    while run.next_report() is not None:
        pass
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 1
    assert run.processes[1].is_alive()
    (run.folder / "wake").touch()
    place = "on rank 0 of 2, in rollout 1, update 2, micro-batch 0 of 3 (phase: reward)"
    assert f"Another rank is late or dead: {place}, a collective operation went without it" in run.errors()
    assert "which waits 15 s at most" in run.errors()
    assert set(run.end()) == {1}


def test_a_reward_that_fails_ends_every_rank_at_once_and_each_says_whose_it_was(crew):
    run = crew("ddp", fail=1)
    assert set(run.end()) == {1}
    assert "This was on rank 1 of 2, in rollout 1, update 2, micro-batch 0 of 3 (phase: reward)." in run.errors(1)
    for rank in (0, 1):
        assert "The reward reward has failed on 47.6% of 42 completions (reward_raised 20)" in run.errors(rank)
        assert "KeyError: 'no such answer'" in run.errors(rank)
        assert "Another rank is late" not in run.errors(rank)


def test_an_error_in_one_process_names_its_place_once(make_module, fit):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) >= 3:
            raise RuntimeError("the judge timed out")
        return [float(len(text)) for text in completions]

    with pytest.raises(RuntimeError, match="the judge timed out") as failed:
        fit(make_module(reward=reward))
    place = "on rank 0 of 1, in rollout 2, update 4, micro-batch 0 of 1 (phase: reward)"
    assert f"This was {place}." in failed.value.__notes__


def test_mistakes_before_training_have_no_place(make_module, fit):
    with pytest.raises(ValueError, match="limit_train_batches") as failed:
        fit(make_module(), accumulate_grad_batches=2, limit_train_batches=3)
    assert not hasattr(failed.value, "__notes__")
