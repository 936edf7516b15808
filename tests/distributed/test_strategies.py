"""Real processes: every strategy trains as one device does, resumes bitwise and exports what it trained.

FSDP1 refuses CPUs: what is tested of it runs through a subclass for tests. NCCL, real devices and sizes are not tested
here.
"""

import json
import os
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.policy.prepare import load_tokenizer
from tests.distributed.train_script import CLIP, LR, STRATEGIES, UPDATES, gpu_strategies, main, make_policy
from tests.error_budget import assert_within, logprob_budget, sum_budget, weights_budget
from tests.forked import run_ranks

SHARDED = ("fsdp1", "fsdp2", "tp", "fsdp2_tp")
MORE_VARIANTS = ("qwen3", "llama", "mistral", "checkpointing", "ema", "other", "bf16", "compiled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With recorded completions: ragged groups of ragged completions, some empty, some without a reward."""
    folder = tmp_path_factory.mktemp("strategies")
    draw = random.Random(0)
    with (folder / "completions.jsonl").open("w") as file:
        for number in range(12):
            size = draw.choice([1, 2, 3, 5, 6])
            row = {
                "prompt": f"{number}+{number % 7}=",
                "completions": ["".join(draw.choices("0123456789+", k=draw.randint(0, 7))) for _ in range(size)],
                "rewards": [round(draw.random(), 2) if draw.random() > 0.1 else None for _ in range(size)],
            }
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(arithmetic, folder):
    """Runs variants under a strategy, all in one start of its processes; gives rank 0's results, or all ranks'."""
    results: dict[tuple[str, str], list[dict]] = {}

    def get(name: str, *variants: str) -> list[list[dict]]:
        missing = [variant for variant in variants if (name, variant) not in results]
        if missing:
            on_gpus = os.environ.get("GVPO_TEST_ACCELERATOR") == "gpu"
            strategies = gpu_strategies(min(2, torch.cuda.device_count())) if on_gpus else STRATEGIES
            run_ranks(folder, strategies[name]()[1], main, str(arithmetic / "model"), folder, name, missing)
            for variant in missing:
                files = sorted(folder.glob(f"{name} {variant} ?.pt"))
                results[name, variant] = [torch.load(file, weights_only=True) for file in files]
        return [results[name, variant] for variant in variants]

    return get


def largest_difference(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def budget_of_updates(weights: dict) -> float:
    """How far float32 may take them apart: the gradients' clipped norm bounds what each update adds."""
    largest = max(float(value.abs().max()) for value in weights.values())
    return float(weights_budget(largest, LR * CLIP, UPDATES))


def distance_trained(result: dict, variant: str, vocab_size: int) -> float:
    start = make_policy(variant, vocab_size).state_dict()
    return max(float((result["weights"][name] - start[name]).abs().max()) for name in start)


@pytest.fixture(scope="module")
def vocab_size(arithmetic) -> int:
    return len(load_tokenizer(str(arithmetic / "model")))


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
@pytest.mark.parametrize(
    "variants",
    [
        ("full", "tied", "lora", "packed"),
        pytest.param(MORE_VARIANTS, marks=pytest.mark.slow),
        pytest.param(("dpo", "sft"), marks=pytest.mark.slow),
    ],
    ids=["full tied lora packed", " ".join(MORE_VARIANTS), "dpo sft"],
)
def test_ten_updates_end_with_the_weights_of_one_device(run, vocab_size, name, variants):
    if name == "fsdp1":  # whose mixed precision casts by autocast("cuda"), and which can't shard a second model
        variants = [variant for variant in variants if variant not in ("bf16", "other")]
    if name in ("fsdp1", "tp", "fsdp2_tp"):
        variants = [variant for variant in variants if variant != "compiled"]
    for variant, ranks, one in zip(variants, run(name, *variants), run("single", *variants), strict=True):
        (one,) = one
        assert distance_trained(one, variant, vocab_size) > 1e-2  # or nothing would be compared
        tolerance = 1e-3 if variant == "bf16" else budget_of_updates(one["weights"])
        assert largest_difference(ranks[0]["weights"], one["weights"]) <= tolerance, variant
        for metric, value in one["metrics"].items():
            of_ranks = [rank["metrics"][metric] for rank in ranks]
            if not metric.startswith(("time/", "throughput/")):
                assert max(of_ranks) == min(of_ranks), metric
            if not metric.startswith(("time/", "throughput/", "update/passes")) and variant != "bf16":
                assert of_ranks[0] == pytest.approx(value, rel=1e-3, abs=1e-4), metric
        if STRATEGIES[name]()[1] > 1 and name != "tp":
            # its groups were cut over ranks
            assert ranks[0]["metrics"]["update/passes"] == (1 if variant == "sft" else 2)


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize("variant", ["full", "tied", "lora"])
def test_gradients_of_the_fused_loss_are_those_of_eager_on_one_device(run, vocab_size, name, variant):
    run(name, "full", "tied", "lora")
    fourth = run(name, variant)[0][0]["fourth"]
    policy = make_policy(variant, vocab_size).double()
    policy.load_state_dict({key: value.double() for key, value in fourth["weights"].items()})
    batch = CompletionBatch(**fourth["rollout"]["batch"])
    loss, logprobs = eager_loss(policy, batch, list(fourth["rows"]), beta=0.5)
    names, parameters = zip(*((n, p) for n, p in policy.named_parameters() if p.requires_grad), strict=True)

    def gradient(value) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    expected = gradient(loss)
    assert fourth["gradients"].keys() == set(names)
    found = torch.cat([fourth["gradients"][name].flatten() for name in names]).double()
    coefficients = torch.autograd.grad(loss, logprobs, retain_graph=True)
    terms = [abs(c) * gradient(logprob).norm() for c, logprob in zip(coefficients, logprobs, strict=True)]
    assert_within((found - expected).norm(), 0.0, sum_budget(sum(terms)))


def eager_loss(policy, batch: CompletionBatch, rows: list[int], beta: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """From the definition, completion by completion, without padding; and the completions' log-probs."""
    losses, logprobs = {}, []
    for row in rows:
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        completion = batch.completion_ids[row][batch.completion_mask[row]]
        logits = policy(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        logprob = logits.log_softmax(-1).gather(-1, completion[:, None]).sum()
        logprobs.append(logprob)
        reference = batch.reference_logprobs[row].double().sum()
        losses.setdefault(int(batch.group_ids[row]), []).append((logprob - reference, batch.rewards[row].double()))
    total = torch.zeros((), dtype=torch.float64)
    for group in losses.values():
        ratios, rewards = map(torch.stack, zip(*group, strict=True))
        residuals = beta * (ratios - ratios.mean()) - (rewards - rewards.mean())
        total = total + residuals.square().sum() / (2 * (len(group) - 1))
    return total / len(losses), logprobs


# the two kinds of sharding together are slow where four processes share two cores; alone each resumes here and below
@pytest.mark.parametrize(
    "name", ["ddp", "fsdp1", "fsdp2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tp", "fsdp2_tp"))]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(run, name):
    ((result, *_),) = run(name, "sampled")
    assert result["whole"]["validation"] > 0
    for step in (3, 5, 6):  # at a rollout's end, within one, at the next one's end
        resumed = result[f"from {step}"]
        assert largest_difference(resumed["weights"], result["whole"]["weights"]) == 0
        assert resumed["prompts"] == result["whole"]["prompts"]


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2"])
def test_ranks_may_call_the_gathered_policy_different_numbers_of_times(run, name):
    ((single,),) = run("single", "uneven")
    (results,) = run(name, "uneven")
    for result in results:
        assert result["equal"]
        assert_within(result["first"], single["first"], logprob_budget(single["first"]))
    torch.testing.assert_close(results[0]["last"], results[1]["last"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "fsdp2_tp"])
def test_ranks_stay_of_one_mind(run, name):
    """Rewards that are never the same twice, validation without rewards, uneven batches, a gradient broken on one."""
    (ranks,) = run(name, "others")
    first = ranks[0]
    for rank in ranks:
        assert rank["validated"] == first["validated"]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rank["own"], first["own"], strict=True))
        assert rank["has_identity"]
        assert rank["skipped"] == 3
    has_rewards = "validation/reward/mean" in first["validated"]
    assert has_rewards == (name in ("ddp", "fsdp2", "fsdp2_tp"))  # tp: rank 0 is the only one that asks
    assert first["validated"]["validation/completion/truncated_fraction"] <= 1
    if name.startswith("fsdp2"):  # a rollout gathers each of the units, two layers and the root, once, and shards it
        assert first["gathers"]
        assert {count for count, _ in first["gathers"]} == {3}
    if name == "fsdp2":
        assert all(is_sharded for _, is_sharded in first["gathers"])
    prompts = {prompt for rank in ranks for prompt in rank["prompts"]}
    assert prompts == {f"{n}+{n % 7}=" for n in range(5)}


# a distributed checkpoint is read by as many ranks as there are
@pytest.mark.parametrize(("name", "other"), [("single", "ddp"), ("tp", "fsdp2")])
def test_another_number_of_ranks_goes_on_between_rollouts_and_is_refused_within_one(run, name, other):
    ((saved, *_),) = run(other, "sampled")
    ((resumed, *_),) = run(name, f"from:{other}")
    assert resumed["prompts"] == saved["whole"]["prompts"]
    assert largest_difference(resumed["weights"], saved["whole"]["weights"]) > 0  # other samples of the same prompts
    assert "within a rollout by 2 data-parallel ranks and can't be resumed by 1" in resumed["refusal"]


def test_ranks_load_a_model_one_after_the_other_where_there_is_no_room_for_two(run):
    (ranks,), ((one,),) = run("fsdp2", "turns"), run("single", "turns")
    assert largest_difference(ranks[0]["weights"], one["weights"]) <= budget_of_updates(one["weights"])
    (first_start, _, first_end), (second_start, _, second_end) = (rank["loading"] for rank in ranks)
    assert first_start < first_end < second_start < second_end


@pytest.mark.parametrize(("name", "reason"), [("fsdp1", "FSDPStrategy"), ("tp", "tensor parallelism")])
def test_layers_that_would_not_train_compiled_are_refused(run, name, reason):
    (ranks,) = run(name, "uncompiled")
    assert all(f"not with {reason}: set torch_compile=False" in rank["refusal"] for rank in ranks)


@pytest.mark.gpu
def test_strategies_on_gpus_end_with_the_weights_of_one(run, monkeypatch):
    """Over NCCL, with FSDP1 itself; also in bfloat16 with float32 weights, and resumed within a rollout."""
    monkeypatch.setenv("GVPO_TEST_ACCELERATOR", "gpu")
    names = gpu_strategies(min(2, torch.cuda.device_count()))
    for name in names:
        for variant, tolerance in (("full", 1e-4), ("lora", 1e-4), ("bf16", 5e-3)):
            ((ours, *_),), ((one,),) = run(name, variant), run("single", variant)
            assert largest_difference(ours["weights"], one["weights"]) <= tolerance, (name, variant)
        ((resumed, *_),) = run(name, "sampled")
        assert largest_difference(resumed["from 5"]["weights"], resumed["whole"]["weights"]) <= 1e-5, name


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("variant", ["full", "tied"])
def test_an_export_is_bitwise_what_was_trained(run, folder, name, variant):
    run(name, "full", "tied", "lora")
    (trained, *_) = run(name, variant)[0]
    exported = AutoModelForCausalLM.from_pretrained(folder / f"export-{name}-{variant}").state_dict()
    assert largest_difference(exported, trained["weights"]) == 0
