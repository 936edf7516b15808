import pytest

from gvpo_lightning.sources.settings import (
    DemonstrationSettings,
    FileSettings,
    ReplaySettings,
    SourceSettings,
)

FILE, REPLAY, SHOWN = FileSettings("x.jsonl", 4), ReplaySettings(4), DemonstrationSettings("answer")


@pytest.mark.parametrize(
    ("settings", "counts", "generates"),
    [
        (SourceSettings(), {"policy": 8}, True),
        (SourceSettings(replay=REPLAY), {"policy": 4, "replay": 4}, True),
        (SourceSettings(replay=ReplaySettings(0.5)), {"policy": 4, "replay": 4}, True),
        (SourceSettings(policy=0, replay=ReplaySettings(8)), {"policy": 0, "replay": 8}, True),
        (SourceSettings(demonstrations=SHOWN), {"policy": 7, "demonstrations": 1}, True),
        (SourceSettings(policy=0.5, file=FILE), {"policy": 4, "file": 4}, True),
        (
            SourceSettings(policy=3, demonstrations=SHOWN, file=FILE),
            {"policy": 3, "demonstrations": 1, "file": 4},
            True,
        ),
        (SourceSettings(policy=0, file=FileSettings("x.jsonl", 1.0)), {"policy": 0, "file": 8}, False),
        (SourceSettings(policy=0, file=FileSettings("x.jsonl")), {"policy": 0, "file": None}, False),
        (SourceSettings(file=FileSettings("x.jsonl")), {"policy": 0, "file": None}, False),
    ],
)
def test_counts_and_fractions_of_a_group_of_eight(settings, counts, generates):
    assert settings.counts(8) == counts
    assert settings.generates == generates


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            SourceSettings(policy=5, replay=REPLAY),
            r"group_size=8, got policy 5 and replay 4: set rollout\.group_size=9",
        ),
        (SourceSettings(replay=ReplaySettings(9)), r"group_size=8, got replay 9: set rollout\.group_size=9"),
        (SourceSettings(policy=0, replay=REPLAY), r"got policy 0 and replay 4"),
        (SourceSettings(replay=ReplaySettings(0)), r"sources\.replay\.count must be at least 1, got 0"),
        (SourceSettings(replay=ReplaySettings(1.5)), r"sources\.replay\.count must be a whole number, or a fraction"),
        (SourceSettings(policy=2, file=FileSettings("x")), r"sources\.file\.count may be left out only where"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_the_mend(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.counts(8)


def test_impossible_replay_is_refused():
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        ReplaySettings(4, capacity=0)
    with pytest.raises(ValueError, match="'uniform' or 'recent', got 'newest'"):
        ReplaySettings(4, selection="newest")
