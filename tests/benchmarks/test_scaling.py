"""The page on many GPUs says what the estimator says, and the estimator's numbers hang together."""

import json
from dataclasses import replace

import pytest

from benchmarks.scaling import LLAMA_70B, QWEN_7B, estimates
from benchmarks.scaling_page import PAGE, ROOM, peaks, updated_page
from gvpo_lightning.estimate import H100, H200, RunFacts, Workload, estimate_memory, estimate_seconds, estimate_traffic


@pytest.fixture(scope="module")
def record():
    return json.loads(json.dumps(estimates()))


def test_page_and_results_are_up_to_date(record, root):
    assert json.loads((root / "benchmarks" / "results" / "scaling.json").read_text()) == record
    assert PAGE.read_text() == updated_page(PAGE.read_text(), record), "run python -m benchmarks.scaling"


def test_sizes_are_those_of_the_published_models(record):
    published = [7_615_616_512, 70_553_706_496]  # the numbers of parameters on the models' own pages
    assert [plan["sizes"]["parameters"] for plan in record["plans"]] == published
    assert (QWEN_7B["num_hidden_layers"], LLAMA_70B["num_hidden_layers"]) == (28, 80)


def test_what_the_page_advises_follows_from_its_numbers(record):
    small, large = record["plans"]
    room = ROOM * record["hardware"]["H100 SXM"]["memory"]
    rollout, training = ({way: peaks(row)[phase] for way, row in large["ways"].items()} for phase in (0, 1))
    assert peaks(small["ways"]["DDP"])[1] > room > max(peaks(small["ways"]["DDP, LoRA of rank 16"]))
    assert max(peaks(small["ways"]["FSDP2"])) < room
    assert rollout["FSDP2"] > ROOM * record["hardware"]["H200 SXM"]["memory"] > room > training["FSDP2"]
    assert max(rollout["TP 8 × FSDP2"], training["TP 8 × FSDP2"]) < room
    beside = {way: sum(row["seconds"].values()) - row["seconds"]["rollout"] for way, row in large["ways"].items()}
    assert beside["TP 8 × FSDP2"] > beside["FSDP2"]


@pytest.fixture
def sizes():
    from transformers import AutoConfig

    from gvpo_lightning.estimate import model_sizes

    return model_sizes(AutoConfig.for_model(**QWEN_7B))


def test_sharding_divides_what_is_held_and_only_that(sizes):
    work = Workload(256, 1024, prompts_per_rollout=64, prompts_per_update=64)
    one, eight = (estimate_memory(sizes, RunFacts(work, count, strategy="fsdp2")) for count in (1, 8))
    for name in ("parameters", "gradients", "optimizer"):
        assert eight.phases["forward"][name] == pytest.approx(one.phases["forward"][name] / 8, rel=1e-6)
    assert eight.phases["rollout"]["whole weights"] == one.phases["rollout"]["whole weights"] == 2 * sizes.parameters


def test_one_gpu_sends_nothing(sizes):
    assert estimate_traffic(sizes, RunFacts(Workload(256, 1024), strategy="fsdp2")) == []


def test_accumulation_multiplies_the_traffic_of_fsdp_and_not_of_ddp(sizes):
    def moved(strategy, accumulate):
        work = Workload(8, 8, prompts_per_rollout=32, prompts_per_update=32, accumulate=accumulate)
        calls = estimate_traffic(sizes, RunFacts(work, 8, strategy=strategy))
        return sum(call.moved for call in calls if call.phase == "train")

    assert moved("ddp", 4) == moved("ddp", 1) == pytest.approx(2 * 7 / 8 * 4 * sizes.parameters)
    assert moved("fsdp2", 4) == pytest.approx(4 * moved("fsdp2", 1))


def test_seconds_follow_the_hardware(sizes):
    facts = RunFacts(Workload(256, 1024, prompts_per_rollout=64, prompts_per_update=64), 8, strategy="fsdp2")
    slow, fast = (estimate_seconds(sizes, facts, card, "vllm") for card in (H100, H200))
    assert fast["rollout"] < slow["rollout"]
    assert fast["train"] == slow["train"]
    # 8 operations a parameter and token, give or take embedding, attention, and prompts that the head does not see
    tokens = 64 * 1280
    expected = 8 * sizes.parameters * tokens / (H100.flops * H100.matmul_share)
    assert slow["train"] == pytest.approx(expected, rel=0.1)


def test_groups_that_are_cut_cost_a_pass_more(sizes):
    whole, cut = (
        RunFacts(Workload(256, 1024, prompts_per_rollout=8, prompts_per_update=8, accumulate=accumulate), 8)
        for accumulate in (1, 2)
    )
    assert (whole.two_passes, cut.two_passes) == (False, True)
    assert estimate_seconds(sizes, cut)["train"] > 1.1 * estimate_seconds(sizes, whole)["train"]


def test_an_objective_without_groups_has_no_pass_more_and_one_with_a_sampler_scores_twice(sizes):
    work = Workload(256, 1024, prompts_per_rollout=8, prompts_per_update=8, accumulate=2)
    for spread in ({"num_gpus": 8, "strategy": "fsdp2"}, {"num_gpus": 8, "tensor_parallel": 8}):
        gvpo = RunFacts(work, **spread, reference="previous")
        grpo = replace(gvpo, couples_groups=False, scores_sampler=True)
        assert not grpo.two_passes
        scored = [
            sum(call.payload for call in estimate_traffic(sizes, facts) if call.phase == "reference")
            for facts in (gvpo, grpo)
        ]
        assert scored[1] == 2 * scored[0] > 0
        seconds = [estimate_seconds(sizes, facts) for facts in (gvpo, grpo)]
        assert seconds[1]["reference"] == pytest.approx(2 * seconds[0]["reference"])
        assert (seconds[1]["train"] < seconds[0]["train"]) == gvpo.two_passes


def test_gpus_that_tensor_parallelism_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="tensor_parallel must divide num_gpus, got 3 and 8"):
        RunFacts(Workload(1, 1), 8, tensor_parallel=3)
