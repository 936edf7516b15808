import itertools
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.paper.distances import distance_to_optimum, divergence, log_normalizer, sample
from benchmarks.paper.pairs import add_distances, all_pairs, pairs, start_pairs
from benchmarks.paper.prepare import make_start
from benchmarks.paper.uniqueness import claims, plot, table
from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.data.rows import encode_prompt
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.loading import LoadingSettings
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer, prepare_policy
from gvpo_lightning.rewards import Rewards
from gvpo_lightning.rollout.settings import GenerationSettings

BETA = 0.5
ROWS = [{"prompt": "1+2="}, {"prompt": "9+8="}]
TOKENS, END = 15, 1
RESPONSES = [[END], *([first, second] for first, second in itertools.product(range(TOKENS), repeat=2) if first != END)]


def starts_with_a_digit(prompts, completions, **columns):
    """A reward that is right for many responses."""
    return [float(completion[:1].isdigit()) for completion in completions]


@pytest.fixture
def policies(tiny_policy, tmp_path):
    """Two random policies that are sure of something, and the second one's folder."""
    found = []
    for seed in (0, 1):
        policy = tiny_policy(seed)
        with torch.no_grad():
            policy.lm_head.weight.mul_(40.0)
        policy.save_pretrained(tmp_path / str(seed))
        prepare_policy(policy)
        found.append(policy)
    return *found, str(tmp_path / "1")


@pytest.fixture
def module(policies, tokenizer):
    """What the measurements need of a `GVPOModule`, whose policy, the reference, is the second one."""
    generation = GenerationSettings(max_new_tokens=2, batch_size=4096)
    rewards = Rewards(starts_with_a_digit)
    return SimpleNamespace(
        policy=policies[1], tokenizer=tokenizer, generation=generation, rewards=rewards, temperature=1.3, beta=BETA,
        seed=0, source=SimpleNamespace(loading_of=lambda name: LoadingSettings()),
        placement=SimpleNamespace(forward_context=nullcontext),
    )  # fmt: skip


def exact_logprobs(policy, tokenizer, temperature):
    """(2 prompts, all responses of at most two tokens) float64."""
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in ROWS for _ in RESPONSES]
    count = len(prompts)
    batch = collate_completions(prompts, RESPONSES * len(ROWS), [False] * count, [0] * count, 0)
    values = score(policy, batch, Scoring(temperature), batch_size=4096).double().sum(dim=1)
    return values.view(len(ROWS), -1)


def test_the_responses_are_all_there_are(policies, module):
    total = exact_logprobs(policies[0], module.tokenizer, module.temperature).exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_divergence_is_the_one_over_all_responses(policies, module):
    first, second, folder = policies
    p, q = (exact_logprobs(policy, module.tokenizer, module.temperature) for policy in (first, second))
    exact = float((p.exp() * (p - q)).sum(dim=1).mean())
    batch = sample(module, first, ROWS, 2000)
    assert exact > 0.3
    assert divergence(module, first, folder, batch) == pytest.approx(exact, rel=0.05)


def test_distance_to_the_optimum_is_the_one_over_all_responses(policies, module):
    first, second, _ = policies
    p, reference = (exact_logprobs(policy, module.tokenizer, module.temperature) for policy in (first, second))
    texts = [module.tokenizer.decode(ids, skip_special_tokens=True) for ids in RESPONSES]
    rewards = torch.tensor(starts_with_a_digit(None, texts), dtype=torch.float64)
    optimum = (reference + rewards / BETA).log_softmax(dim=1)
    exact = float((p.exp() * (p - optimum)).sum(dim=1).mean())
    right = (reference.exp() * rewards).sum(dim=1)
    log_z = float(log_normalizer(right, BETA).mean())
    found = distance_to_optimum(module, first, sample(module, first, ROWS, 2000), log_z)
    assert exact > 0.3
    assert found == pytest.approx(exact, rel=0.1)
    # the reference itself, of which only the reward is left
    own = sample(module, second, ROWS, 2000)
    at_reference = float((reference.exp() * (reference - optimum)).sum(dim=1).mean())
    assert distance_to_optimum(module, second, own, log_z) == pytest.approx(at_reference, abs=0.1)


def test_completions_are_sampled_from_the_whole_distribution_at_the_temperature_of_logprobs(policies, module):
    module.generation = replace(module.generation, temperature=0.1, top_k=1)
    assert len({tuple(ids) for ids in sample(module, policies[0], ROWS, 200).completion_ids.tolist()}) > 5


def rows(distance: float, optimum: float, method: str = "GVPO") -> list[dict]:
    names = [(start, sampler) for start in (0, 1, 2) for sampler in (("own", "file") if method == "GVPO" else ("own",))]
    return [
        {
            "labels": {"method": method, "start": start, "sampler": sampler},
            "seed": start,
            "stopped": None,
            "end": {"accuracy": 0.5},
            "distances": {
                split: {
                    "to": [[*name, 0.0 if name == (start, sampler) else distance] for name in names],
                    "start_to": [0.0 if other == start else 1.0 for other in (0, 1, 2)],
                    "optimum": optimum,
                    "start_optimum": 1.0,
                }
                for split in ("training", "held-out")
            },
        }
        for start, sampler in names
    ]


def test_pairs_are_of_different_policies():
    found = rows(0.2, 0.1)
    assert pairs(found, "training", same_start=False, same_sampler=True) == [0.2] * 12
    assert pairs(found, "training", same_start=True, same_sampler=False) == [0.2] * 6
    assert all_pairs(found, "training") == [0.2] * 30
    assert start_pairs(found, "training") == [1.0] * 6


def test_claims_of_uniqueness():
    assert [c.holds for c in claims(rows(0.01, 0.02) + rows(0.5, 0.4, "GRPO"))] == [True, True, True]
    assert [c.holds for c in claims(rows(0.2, 0.06) + rows(0.1, 0.4, "GRPO"))] == [False, False, False]
    own = rows(0.02, 0.02) + rows(0.04, 0.4, "GRPO")
    for row in own[-3:]:  # of one start near, of another far
        row["distances"]["training"]["to"] = [
            [*to[:2], to[2] * (1 + row["seed"]) / 2] for to in row["distances"]["training"]["to"]
        ]
    assert claims(own)[-1].holds is None
    assert [c.holds for c in claims(rows(0.01, 0.02)[:2])] == [None, None]  # one start


def test_claims_are_about_the_samplers_that_both_have():
    found = rows(0.01, 0.02)
    for row in found:  # GVPO's policies from a file are far from all others
        for of in row["distances"].values():
            of["to"] = [[start, sampler, 9.0 if sampler == "file" else kl] for start, sampler, kl in of["to"]]
    assert claims(found + rows(0.5, 0.4, "GRPO"))[-1].holds is True


def test_stopped_runs_are_counted_and_starts_keep_their_places():
    from matplotlib.figure import Figure

    found = rows(0.01, 0.02)
    for row in found[:2]:  # all of start 0
        row |= {"end": None, "stopped": "update 3"}
        del row["distances"]
    assert start_pairs(found[2:], "training") == [1.0] * 4
    assert "GVPO (stopped: 2)" in table(found)
    plot(found, Figure())
    gone = [{name: value for name, value in row.items() if name != "distances"} for row in found]
    assert claims(gone) == []
    assert table(gone)
    plot(gone, Figure())


def test_starts_are_the_policy_with_noise_of_the_given_size(root, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{policy: {root / 'configs/arithmetic/model'}}}")
    for seed in (0, 1):
        make_start((str(config),), tmp_path / f"start{seed}", 0.5, seed)
    base = dict(load_policy(str(root / "configs/arithmetic/model")).named_parameters())
    starts = [dict(load_policy(str(tmp_path / f"start{seed}")).named_parameters()) for seed in (0, 1)]
    for name, weight in base.items():
        noises = [(start[name] - weight).detach() for start in starts]
        for noise in noises:
            assert float(noise.square().mean().sqrt() / weight.detach().square().mean().sqrt()) == pytest.approx(
                0.5, rel=0.3
            )
        if weight.numel() > 1000:
            assert abs(float(torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))[0, 1])) < 0.1
    assert load_tokenizer(str(tmp_path / "start0"))("1+2")["input_ids"] == [4, 13, 5]


def test_rows_take_up_the_distances_of_the_policies_that_ended():
    found = rows(0.0, 0.0)[:3]  # start 0 with two samplers, start 1 with one
    for row, stopped in zip(found, (None, "update 3: diverged", None), strict=True):
        row |= {"settings": {"model.policy": f"start{row['labels']['start']}"}, "stopped": stopped}
        del row["distances"]
    measured = {
        "starts": {"kl": [[0.0, 5.0], [6.0, 0.0]], "optimum": [0.5, 0.6]},
        "GVPO": {"kl": [[0.0, 1.0], [2.0, 0.0]], "optimum": [0.1, 0.2]},
    }
    add_distances(found, ["start0", "start1"], "training", measured)
    first, diverged, second = found
    assert first["distances"]["training"]["to"] == [[0, "own", 0.0], [1, "own", 1.0]]
    assert second["distances"]["training"] == {
        "to": [[0, "own", 2.0], [1, "own", 0.0]],
        "start_to": [6.0, 0.0],
        "optimum": 0.2,
        "start_optimum": 0.6,
    }
    assert "distances" not in diverged
