"""Any group size, number of prompts and micro-batch: the gradient is one big batch's, also through a real model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_lightning.data.batch import collate_completions
from gvpo_lightning.policy.head import Scoring, completion_logprobs, completion_loss
from gvpo_lightning.policy.prepare import prepare_policy
from gvpo_lightning.rollout.plan import Limits, plan_updates
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.updates.loss import first_pass, sequence_coefficients
from gvpo_lightning.updates.meters import scatter
from tests.watching import on_update

BETA = 0.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policies():
    """The same random policy in float64 and bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=15,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    low = Qwen2ForCausalLM(config).to(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    exact = Qwen2ForCausalLM(config).double()
    exact.load_state_dict(low.state_dict())  # the same weights, so that only the arithmetic differs
    for policy in (exact, low):
        prepare_policy(policy)
    return exact, low


def random_rollout(sizes, seed, longest=6) -> Rollout:
    """Ragged groups of these sizes; about every fifth completion is dropped."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    prompts, completions, group_ids = [], [], []
    for group, size in enumerate(sizes):
        prompt = draw(3, 15, (int(draw(1, 5)),)).tolist()
        for _ in range(size):
            prompts.append(prompt)
            completions.append(draw(3, 15, (int(draw(1, longest + 1)),)).tolist())
            group_ids.append(group)
    batch = collate_completions(prompts, completions, [False] * len(prompts), group_ids, 0)
    batch.rewards = torch.randn(len(prompts), generator=generator)
    batch.reference_logprobs = -3 * torch.rand(batch.completion_mask.shape, generator=generator) * batch.completion_mask
    batch.drop(draw(0, 5, (len(prompts),)) == 0)
    return Rollout(0, batch, [""] * len(sizes), [""] * len(prompts), ["policy"] * len(prompts), batch.lengths.tolist())


def planned_gradient(policy, rollout, update):
    """As the module trains an update's parts, one a rank, and as Lightning and DDP add them up."""
    total = [torch.zeros_like(p) for p in policy.parameters()]
    parts = [[rollout.micro_batch(rows, CPU) for rows in part.micro_batches] for part in update]
    if update[0].is_cut:
        # in place of the ranks' all-reduce
        log_ratios = sum(
            scatter(first_pass(policy, mine, Scoring())[0], part.positions, len(part.rows))
            for part, mine in zip(update, parts, strict=True)
        )
    for part, mine in zip(update, parts, strict=True):
        known = [None] * len(mine)
        num_groups = max(part.num_groups, 1)
        if part.is_cut:
            whole = rollout.micro_batch(part.rows, CPU)
            coefficients = sequence_coefficients(
                log_ratios, whole.rewards, whole.group_ids, BETA, num_groups=num_groups, max_log_ratio=1e4
            )
            known = [coefficients[where] if where else coefficients.new_zeros(1) for where in part.positions]
        for micro_batch, its_coefficients in zip(mine, known, strict=True):
            result = completion_loss(
                policy, micro_batch, BETA, num_groups=num_groups, sequence_coefficients=its_coefficients
            )
            loss = result.loss * part.scale / len(mine) / len(update)
            for sum_, gradient in zip(total, torch.autograd.grad(loss, list(policy.parameters())), strict=True):
                sum_ += gradient
    return torch.cat([g.flatten() for g in total])


def big_batch_gradient(policy, rollout, rows):
    """The definition over all completions of an update at once, by plain autograd."""
    part = rollout.micro_batch(rows, CPU)
    logprobs, _ = completion_logprobs(policy, part, Scoring(implementation="reference"))
    log_ratios = (logprobs.double() - part.reference_logprobs.double()).sum(dim=1)
    losses = [log_ratios.sum() * 0]
    for group in part.group_ids.unique():
        mine = (part.group_ids == group) & part.kept
        if int(mine.sum()) >= 2:
            ratio, reward = log_ratios[mine], part.rewards[mine].double()
            residual = BETA * (ratio - ratio.mean()) - (reward - reward.mean())
            losses.append(residual.square().sum() / (2 * (len(ratio) - 1)))
    loss = torch.stack(losses).sum() / max(len(losses) - 1, 1)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def plan(rollout, num_ranks, **settings):
    """The updates as every rank works them out: [update][rank]."""
    shapes = rollout.group_shapes()
    ranks = [plan_updates(shapes, rank=rank, num_ranks=num_ranks, **settings) for rank in range(num_ranks)]
    return list(zip(*ranks, strict=True))


CASES = {
    "sizes": st.lists(st.integers(0, 6), min_size=1, max_size=6),
    "num_ranks": st.integers(1, 5),
    "num_updates": st.integers(1, 3),
    "accumulate": st.integers(1, 5),
    "completions": st.none() | st.integers(1, 8),
    "tokens": st.none() | st.integers(8, 60),
    "seed": st.integers(0, 20),
}


@settings(max_examples=40, derandomize=True, database=None)
@given(case=st.fixed_dictionaries(CASES))
def test_any_cut_has_the_gradient_of_one_big_batch(policies, case):
    exact, _ = policies
    rollout = random_rollout(case["sizes"], case["seed"])
    updates = plan(
        rollout,
        case["num_ranks"],
        num_updates=case["num_updates"],
        accumulate=case["accumulate"],
        seed=case["seed"],
        limits=Limits(case["completions"], case["tokens"]),
    )
    trained = []
    for update in updates:
        assert all(len(part.micro_batches) == case["accumulate"] for part in update)
        rows = sorted(row for part in update for micro_batch in part.micro_batches for row in micro_batch)
        assert all(list(part.rows) == rows for part in update)
        torch.testing.assert_close(
            planned_gradient(exact, rollout, update), big_batch_gradient(exact, rollout, rows), atol=1e-12, rtol=1e-10
        )
        trained += rows
    sizes = [int((rollout.batch.kept & (rollout.batch.group_ids == g)).sum()) for g in range(len(case["sizes"]))]
    assert len(trained) == len(set(trained)) == sum(size for size in sizes if size >= 2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_cut_update_in_bfloat16_is_as_near_the_truth_as_eager_in_one_batch(policies, num_ranks):
    exact, low = policies
    ours, eager = [], []
    for seed in range(5):
        rollout = random_rollout([8, 5, 7], seed)
        accumulate = 6 // num_ranks
        (update,) = plan(rollout, num_ranks, num_updates=1, accumulate=accumulate, seed=0, limits=Limits(completions=3))
        assert update[0].is_cut
        rows = update[0].rows
        truth = big_batch_gradient(exact, rollout, rows)
        ours.append(float((planned_gradient(low, rollout, update).double() - truth).norm() / truth.norm()))
        eager.append(float((big_batch_gradient(low, rollout, rows).double() - truth).norm() / truth.norm()))
    assert sum(ours) <= 1.5 * sum(eager) + 1e-3, (ours, eager)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


@pytest.mark.parametrize(
    ("limits", "accumulate"),
    [({"micro_batch_size": 3}, 6), ({"micro_batch_tokens": 24}, 8), ({"micro_batch_size": 1}, 16), ({}, 7)],
)
def test_cut_groups_train_as_whole_ones_do_and_say_so(make_module, fit, weights, limits, accumulate, caplog):
    sizes = {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4}
    whole = make_module(optimizer=sgd, rollout=RolloutSettings(**sizes))
    cut = make_module(optimizer=sgd, rollout=RolloutSettings(**sizes, **limits))
    # in float64, where the order of sums makes no difference that four updates could amplify
    trainer = fit(whole, max_steps=4, precision="64-true")
    assert float(trainer.callback_metrics["update/passes"]) == 1
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer = fit(cut, max_steps=4, accumulate_grad_batches=accumulate, precision="64-true")
    assert float(trainer.callback_metrics["update/passes"]) == 2
    assert caplog.text.count("Groups are cut over micro-batches") == 1
    assert weights(cut).dtype == torch.float64
    torch.testing.assert_close(weights(cut), weights(whole), atol=1e-8, rtol=0)  # the norms are float32's
    assert math.isfinite(float(trainer.callback_metrics["entropy"]))
    assert math.isfinite(float(trainer.callback_metrics["loss"]))


def test_cut_groups_train_as_whole_ones_do_in_mixed_precision(make_module, fit, weights):
    sizes = {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4}
    steps = []
    for precision, limit, accumulate in (("32-true", None, 1), ("bf16-mixed", None, 1), ("bf16-mixed", 3, 6)):
        module = make_module(optimizer=sgd, rollout=RolloutSettings(**sizes, micro_batch_size=limit))
        before = weights(module)
        fit(module, max_steps=1, precision=precision, accumulate_grad_batches=accumulate)
        steps.append(weights(module) - before)
    exact, whole, cut = steps
    assert (cut - exact).norm() <= 1.2 * (whole - exact).norm() + 1e-6


def test_remainders_are_trained(make_module, fit, prompts):
    """7 prompts a rollout in updates of at most 3, 23 prompts: all are trained, none twice in a pass."""
    rollout = RolloutSettings(group_size=3, prompts_per_rollout=7, prompts_per_update=3)
    module = make_module(rollout=rollout)
    trained, sizes = [], []

    def note(update, rollout):
        rows = [row for part in update.micro_batches for row in part]
        groups = {int(rollout.batch.group_ids[row]) for row in rows}
        trained.extend(rollout.prompts[group] for group in groups)
        sizes.append(len(groups))

    on_update(module, note)
    fit(module, rows=prompts[:23], max_steps=12, accumulate_grad_batches=2)
    assert sorted(sizes[:3]) == [2, 2, 3]  # as equal as can be
    assert len(trained) == 28
    assert len(set(trained[:21])) == 21
    assert set(trained) == {row["prompt"] for row in prompts[:23]}


def test_a_log_ratio_that_is_not_finite_skips_a_cut_update_too(make_module, fit, weights, monkeypatch):
    rollout = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=3)
    module = make_module(rollout=rollout)
    before = weights(module)
    original = Rollout.micro_batch

    def broken(rollout, rows, device):
        part = original(rollout, rows, device)
        part.reference_logprobs[0, 0] = torch.nan
        return part

    monkeypatch.setattr(Rollout, "micro_batch", broken)
    fit(module, max_steps=1, accumulate_grad_batches=6)
    assert torch.equal(weights(module), before)
    assert module.run.skipped_updates == 1


def test_a_token_budget_that_lengths_exceed_is_warned_of(make_module, fit):
    rollout = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_tokens=20)
    with pytest.warns(UserWarning, match=r"Raise trainer\.accumulate_grad_batches"):
        fit(make_module(rollout=rollout), max_steps=2, accumulate_grad_batches=2)
