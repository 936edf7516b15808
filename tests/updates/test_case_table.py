"""The rows of the mathematics' case table that need a model and a Trainer."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from gvpo_lightning.policy.head import Scoring, completion_logprobs, score
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.updates import loss as update_loss
from tests.error_budget import assert_within
from tests.update_budget import scores_budget
from tests.watching import on_rollout


@pytest.fixture
def records(monkeypatch):
    """Each micro-batch that is trained, with the policy's log-probs at that moment."""
    found, right = [], update_loss.completion_loss

    def spy(policy, batch, *arguments, **options):
        result = right(policy, batch, *arguments, **options)
        found.append((batch, batch.unpack(result.token_logprobs)))
        return result

    monkeypatch.setattr(update_loss, "completion_loss", spy)
    return found


@pytest.mark.parametrize("reference", ["frozen", "previous"])
def test_first_update_after_a_rollout_has_log_ratio_zero(make_module, fit, reference, records):
    module = make_module(reference=reference)
    fit(module, max_steps=8)
    gaps = [float((logprobs - batch.reference_logprobs).abs().max()) for batch, logprobs in records]
    firsts = gaps[0:1] if reference == "frozen" else gaps[0::2]
    budget = scores_budget(module.policy, records[0][0])
    assert max(firsts) <= budget
    assert min(gaps[1::2]) > 2 * budget


def test_the_frozen_reference_stays_and_the_previous_one_follows(make_module, fit, weights):
    frozen, previous = make_module(), make_module(reference="previous")
    start = weights(frozen)
    fit(frozen)
    fit(previous)
    assert torch.equal(torch.cat([value.flatten() for value in frozen.reference.weights.values()]), start)
    moved = weights(frozen)
    with frozen.reference.applied(frozen.policy):
        assert torch.equal(weights(frozen), start)
    assert torch.equal(weights(frozen), moved)
    assert not torch.equal(weights(frozen), start)
    with previous.reference.applied(previous.policy) as model:
        assert model is previous.policy
        assert not torch.equal(weights(previous), start)
    assert len(list(frozen.parameters())) == len(list(frozen.policy.parameters()))  # the reference is not trained
    assert not any("reference" in name for name in frozen.state_dict())


def test_equal_rewards_still_give_a_gradient_once_the_policy_has_moved(make_module, fit, weights):
    module = make_module(reward=lambda prompts, completions, **_: [1.0] * len(completions), optimizer=_sgd)
    start = weights(module)
    fit(module, max_steps=2)
    assert torch.allclose(weights(module), start, atol=1e-6)  # l = 0 and no advantage: at the optimum already
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    moved = weights(module)
    fit(module, max_steps=2)
    assert float((weights(module) - moved).norm()) > 1e-3


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def test_rewards_that_are_not_finite_drop_their_completion_and_are_counted(make_module, fit):
    def reward(prompts, completions, **_):
        return [
            None if i == 0 else float("nan") if i == 1 else float("inf") if i == 2 else i / 10
            for i in range(len(completions))
        ]

    module = make_module(reward=reward)
    trainer = fit(module, max_steps=2)
    assert module.rollout.batch.kept.tolist() == [False] * 3 + [True] * 29
    assert float(trainer.callback_metrics["completion/dropped_fraction"]) == pytest.approx(3 / 32)
    assert torch.isfinite(torch.stack([p.sum() for p in module.policy.parameters()])).all()


def test_group_of_one_after_drops_is_counted_and_not_in_the_mean(make_module, fit):
    module = make_module(reward=lambda prompts, completions, **_: [None] * 3 + [1.0, *_varied(len(completions) - 4)])
    trainer = fit(module, max_steps=2)
    assert module.rollout.batch.kept.view(-1, 4).sum(1).tolist() == [1, 4, 4, 4, 4, 4, 4, 4]
    assert sorted(update.num_groups for update in module.updates) == [3, 4]
    dropped = [update.num_dropped for update in module.updates]
    assert sorted(dropped) == [0, 1]
    assert float(trainer.callback_metrics["group/dropped"]) == dropped[-1]


def _varied(count):
    return [(i % 4) / 3 for i in range(count)]


def test_every_reward_missing_trains_nothing_and_says_so(make_module, fit, weights):
    module = make_module(reward=lambda prompts, completions, **_: [None] * len(completions), optimizer=_sgd)
    start = weights(module)
    trainer = fit(module, max_steps=2)
    assert torch.equal(weights(module), start)
    assert float(trainer.callback_metrics["completion/dropped_fraction"]) == 1.0


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_truncated_completions_are_kept_or_leave_their_group(make_module, fit, choice):
    settings = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, truncated=choice)
    module = make_module(rollout=settings)
    trainer = fit(module, max_steps=2)
    batch = module.rollout.batch
    assert batch.truncated.any()
    assert torch.equal(batch.kept, torch.ones_like(batch.kept) if choice == "keep" else ~batch.truncated)
    assert float(trainer.callback_metrics["completion/truncated_fraction"]) > 0


def test_policy_and_reference_are_scored_at_the_same_temperature(make_module, fit, records):
    module = make_module(temperature=0.7)
    fit(module, max_steps=1)
    batch, logprobs = records[0]
    assert_within(logprobs, batch.reference_logprobs, scores_budget(module.policy, batch) / 0.7)
    with module.reference.applied(module.policy) as model:
        at_one = score(model, batch, Scoring(1.0), batch_size=64)
    assert float((at_one - batch.reference_logprobs).abs().max()) > 1e-2


def test_dropout_of_the_users_model_is_switched_off(make_module, fit, tiny_policy, records):
    module = make_module(policy=tiny_policy(attention_dropout=0.5))
    fit(module, max_steps=1)
    batch, logprobs = records[0]
    assert module.policy.training
    assert_within(logprobs, batch.reference_logprobs, scores_budget(module.policy, batch))


def break_log_ratios(monkeypatch, module, at_steps):
    """Puts NaN into the reference log-probs of one completion in the given micro-batches."""
    original = Rollout.micro_batch

    def broken(rollout, rows, device):
        part = original(rollout, rows, device)
        if module.microstep in at_steps:
            part.reference_logprobs[0, 0] = torch.nan
        return part

    monkeypatch.setattr(Rollout, "micro_batch", broken)


def test_log_ratio_that_is_not_finite_skips_the_whole_update(make_module, fit, weights, monkeypatch):
    module, seen = make_module(), []
    break_log_ratios(monkeypatch, module, at_steps={2})  # the first of the second update's two micro-batches

    class AfterUpdates(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.microstep % 2 == 0:
                seen.append((weights(module), module.run.skipped_updates, module.run.consecutive_skips))

    trainer = fit(module, max_steps=3, accumulate_grad_batches=2, callbacks=[AfterUpdates()])
    before, skipped, after = (entry[0] for entry in seen)
    assert torch.equal(skipped, before)
    assert [entry[1:] for entry in seen] == [(0, 0), (1, 1), (1, 0)]
    assert float(trainer.callback_metrics["update/skipped"]) == 1
    assert not torch.equal(after, before)
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("micro_batch_size", [None, 3], ids=["whole groups", "cut groups"])
def test_log_ratio_beyond_the_limit_skips_the_whole_update(make_module, fit, weights, records, micro_batch_size):
    sizes = {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4, "micro_batch_size": micro_batch_size}

    def train(max_log_ratio, steps):
        module = make_module(rollout=RolloutSettings(**sizes), max_log_ratio=max_log_ratio)
        trainer = fit(module, max_steps=steps, accumulate_grad_batches=6)
        return module, float(trainer.callback_metrics["log_ratio/policy/max"])

    first, smallest = train(1e4, 1)
    _, largest = train(1e4, 2)
    assert smallest < 1e-4 < 1e-2 < largest  # as the policy moves away
    assert train(2 * largest, 2)[0].run.skipped_updates == 0
    records.clear()
    skipped, seen = train(largest / 2, 2)
    assert skipped.run.skipped_updates == 1
    assert seen == largest
    assert torch.equal(weights(skipped), weights(first))
    assert len(records) == 12  # it is stepped through all the same


def test_gradient_that_is_not_finite_skips_the_update_too(make_module, fit, weights):
    module = make_module()
    start = weights(module)

    def poison():
        next(module.policy.parameters()).grad[0, 0] = torch.nan

    module.on_after_backward = poison
    fit(module, max_steps=1)
    assert torch.equal(weights(module), start)
    assert module.run.skipped_updates == 1


def test_update_in_which_nothing_counts_moves_nothing_by_momentum_or_decay(make_module, fit, weights):
    rewards = {"missing": False}

    def reward(prompts, completions, **_):
        return [None] * len(completions) if rewards["missing"] else _varied(len(completions))

    module = make_module(reward=reward, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.5))
    after = []
    module.on_train_batch_end = lambda *_: after.append(weights(module))
    on_rollout(module, lambda index: rewards.update(missing=index == 1))
    fit(module, max_steps=6)
    assert torch.equal(after[1], after[2])  # the second rollout's two updates
    assert torch.equal(after[2], after[3])
    assert not torch.equal(after[3], after[4])
    assert module.run.skipped_updates == 0


def test_too_many_skipped_updates_stop_the_run(make_module, fit, monkeypatch):
    module = make_module(max_skipped_updates=2)
    break_log_ratios(monkeypatch, module, at_steps=range(100))
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        fit(module, max_steps=8)


@pytest.mark.parametrize("accumulate", [1, 3, 9])
def test_gradient_of_an_update_is_that_of_one_big_batch(make_module, fit, monkeypatch, accumulate):
    """Against the plain formula over the whole update, with unequal lengths, drops and a group of one."""
    rewards = [None, None, None, 0.3, None, *_varied(27)]
    module = make_module(reward=lambda prompts, completions, **_: rewards[: len(completions)], optimizer=_sgd)
    module.policy.double()
    with torch.no_grad():
        reference = {name: p.clone() for name, p in module.policy.named_parameters()}
    gradients = []
    monkeypatch.setattr(
        module,
        "on_before_optimizer_step",
        lambda optimizer: gradients.append([p.grad.clone() for p in module.policy.parameters()]),
    )
    fit(module, max_steps=1, accumulate_grad_batches=accumulate)
    assert module.updates[0].is_cut == (accumulate > 4)

    batch = module.rollout.batch
    rows = list(module.updates[0].rows)
    groups = batch.group_ids[rows].unique().tolist()
    assert len(groups) == module.updates[0].num_groups
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            parameter.copy_(reference[name])
    logprobs, _ = completion_logprobs(module.policy, batch)
    losses = []
    for group in groups:
        rows = (batch.group_ids == group) & batch.kept
        log_ratio = logprobs[rows].sum(1) - batch.reference_logprobs[rows].double().sum(1)
        reward = batch.rewards[rows].double()
        residual = 0.5 * (log_ratio - log_ratio.mean()) - (reward - reward.mean())
        losses.append(residual.square().sum() / (2 * (int(rows.sum()) - 1)))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(module.policy.parameters()))
    for ours, truth in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-10, rtol=1e-7)
