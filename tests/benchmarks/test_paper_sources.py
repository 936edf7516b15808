from pathlib import Path

import pytest

from benchmarks.paper.prepare import setting
from benchmarks.paper.sources import FRESH, MIXTURES, RECORDED, SHOWN, claims, mixture_settings, replayed_share
from gvpo_lightning.sources import DemonstrationSettings, FileSettings, ReplaySettings, SourceSettings

KINDS = {"replay": ReplaySettings, "file": FileSettings, "demonstrations": DemonstrationSettings}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_is_what_its_name_says(mixture):
    given = mixture_settings(mixture, Path("recorded.jsonl"), "answer").get("model.sources", {})
    settings = {name: KINDS[name](**value) if name in KINDS else value for name, value in given.items()}
    counts = SourceSettings(**settings).counts(8)
    historical, fresh = (1, 7) if mixture == SHOWN else map(int, mixture.split(":"))
    assert counts["policy"] == fresh
    assert sum(counts.values()) - counts["policy"] == historical
    assert SourceSettings(**settings).generates == (mixture != RECORDED)


def test_without_right_answers_nothing_is_shown():
    assert mixture_settings(SHOWN, Path("recorded.jsonl"), None) is None


def test_the_last_config_that_says_something_holds(tmp_path):
    texts = ("data: {train_split: 'train[:9]'}\nmodel: {policy: a}", "model: {policy: b}", "trainer: {devices: 1}")
    paths = tuple(str(tmp_path / f"{number}.yaml") for number in range(3))
    for path, text in zip(paths, texts, strict=True):
        Path(path).write_text(text)
    assert setting(paths, "data.train_split", "train") == "train[:9]"
    assert setting(paths, "model.policy", None) == "b"
    assert setting(paths, "model.policy.name", "default") == "default"


def rows(accuracies: dict[str, list[float]]) -> list[dict]:
    return [
        {"labels": {"task": "sums", "historical:fresh": mixture}, "seed": seed, "end": {"accuracy": value}}
        for mixture, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_claims_are_about_the_same_seeds():
    noisy = [0.5, 0.7, 0.9]
    found = claims(rows({FRESH: noisy, "2:6": [v + 0.01 for v in noisy], "4:4": [v - 0.2 for v in noisy]}))
    assert [claim.holds for claim in found] == [True, False]
    assert [claim.source for claim in found] == ["paper", "paper"]
    (undecided,) = claims(rows({FRESH: noisy, RECORDED: [0.5, 0.6, 0.9]}))
    assert undecided.holds is None


def test_replayed_share_is_over_the_whole_run():
    assert replayed_share({"trace": [{"replayed": 0.0}, {"replayed": 0.5}, {}, {"replayed": 0.5}]}) == 0.25
