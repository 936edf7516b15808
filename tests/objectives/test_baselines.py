"""The objectives that GVPO is compared with: against TRL's own losses, and against their closed forms.

Of TRL only the call of the model is a stand-in, which gives the log-probs of the test; advantages are worked out from
TRL's formulas, in loops.
"""

import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives import gvpo as objectives
from gvpo_lightning.objectives import make_objective
from gvpo_lightning.objectives.baselines import grpo_loss, policy_gradient_loss
from gvpo_lightning.objectives.settings import ObjectiveSettings
from tests.objectives.builders import assert_same

BETA, CLIP, LONGEST = 0.3, 0.2, 9


def random_update(sizes=(4, 4, 4), *, seed=0, shift=0.2, rewards=None) -> tuple[torch.Tensor, CompletionBatch]:
    """Log-probs of the policy, float64 with gradient, and a batch sampled up to `shift` nats a token away from it."""
    generator = torch.Generator().manual_seed(seed)
    count, tokens = sum(sizes), 6

    def draw(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (count, 1), generator=generator)
    policy = -3 * draw(count, tokens) * mask
    batch = CompletionBatch(
        prompt_ids=torch.ones(count, 1, dtype=torch.int64),
        prompt_mask=torch.ones(count, 1, dtype=torch.bool),
        completion_ids=torch.ones(count, tokens, dtype=torch.int64),
        completion_mask=mask,
        rewards=draw(count) if rewards is None else torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        truncated=torch.zeros(count, dtype=torch.bool),
        source_ids=torch.zeros(count, dtype=torch.int64),
        reference_logprobs=-3 * draw(count, tokens) * mask,
        sampler_logprobs=(policy + shift * (2 * draw(count, tokens) - 1)) * mask,
    )
    return policy.requires_grad_(), batch


def ours(kind, policy, batch, beta=BETA, **settings):
    """Loss, gradient and number of clipped ratios of a whole update."""
    objective = make_objective(ObjectiveSettings(kind, **settings), beta, LONGEST)
    loss, clipped = objective.loss(policy, batch, objective.terms(batch))
    return loss.detach(), torch.autograd.grad(loss, policy)[0], int(clipped)


def in_groups(values, sizes):
    return [part.tolist() for part in values.split(list(sizes))]


# -- TRL's losses ----------------------------------------------------------------------------------------------


class FakeAccelerator:
    """One process."""

    num_processes, device = 1, torch.device("cpu")

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor, reduction):
        return tensor


def light_trainer(policy, **attributes):
    """What TRL's `_compute_loss` reads of its trainer, the model's log-probs being `policy`."""
    given = lambda *_, **__: (policy, torch.zeros_like(policy), None)  # noqa: E731
    return SimpleNamespace(
        **{
            "_get_per_token_logps_and_entropies": given,
            "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            "beta": BETA,
            "epsilon_low": CLIP,
            "epsilon_high": CLIP,
            "max_completion_length": LONGEST,
            "args": SimpleNamespace(use_bias_correction_kl=False, delta=None),
            "model": SimpleNamespace(training=True),
            "current_gradient_accumulation_steps": 1,
            "accelerator": FakeAccelerator(),
            "_metrics": {"train": defaultdict(list)},
            "_total_train_tokens": 0,
            "_tp_size": 1,
        }
        | attributes
    )


def trl_inputs(batch, advantages):
    return {
        "prompt_ids": batch.prompt_ids,
        "prompt_mask": batch.prompt_mask.long(),
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.completion_mask.long(),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": batch.sampler_logprobs,
        "old_logps": batch.sampler_logprobs.sum(1),
        "ref_per_token_logps": batch.reference_logprobs,
    }


@pytest.mark.parametrize("beta", [BETA, 0.0])
@pytest.mark.parametrize("shift", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_grpo_is_trls_compute_loss_given_the_log_probs(kind, shift, beta):
    trainers = pytest.importorskip("trl.trainer.grpo_trainer")
    sizes = (4, 4, 4)
    policy, batch = random_update(sizes, shift=shift)
    advantages = []
    for rewards in in_groups(batch.rewards, sizes):
        scale = statistics.stdev(rewards) + 1e-4 if kind == "grpo" else 1.0
        advantages += [(reward - statistics.mean(rewards)) / scale for reward in rewards]
    trainer = light_trainer(policy, loss_type=kind, beta=beta)
    loss = trainers.GRPOTrainer._compute_loss(trainer, None, trl_inputs(batch, advantages))
    (expected,) = torch.autograd.grad(loss, policy)
    own, gradient, clipped = ours(kind, policy, batch, beta)
    assert_same(own, loss.detach())
    assert_same(gradient, expected)
    (fraction,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert clipped / int(batch.lengths.sum()) == pytest.approx(fraction)
    assert (clipped > 0) == (shift > 0.3)


@pytest.mark.parametrize("beta", [BETA, 0.0])
@pytest.mark.parametrize("shift", [0.0, 0.02, 0.6])
def test_policy_gradient_is_trls_rloo_compute_loss_given_the_log_probs(shift, beta):
    trainers = pytest.importorskip("trl.trainer.rloo_trainer")
    sizes = (4, 4, 4)
    policy, batch = random_update(sizes, shift=shift)
    penalised = batch.rewards - beta * (batch.sampler_logprobs - batch.reference_logprobs).sum(1)
    advantages = []
    for rewards in in_groups(penalised, sizes):
        advantages += [r - statistics.mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    trainer = light_trainer(policy)
    loss = trainers.RLOOTrainer._compute_loss(trainer, None, trl_inputs(batch, advantages))
    (expected,) = torch.autograd.grad(loss, policy)
    own, gradient, clipped = ours("policy_gradient", policy, batch, beta)
    assert_same(own, loss.detach())
    assert_same(gradient, expected * batch.completion_mask)
    (fraction,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert clipped / len(batch) == pytest.approx(fraction)
    assert (clipped > 0) == (shift > 0.3)


def test_dpo_is_trls_sigmoid_compute_loss_given_the_log_probs():
    trainers = pytest.importorskip("trl.trainer.dpo_trainer")
    policy, batch = random_update((2,) * 5, rewards=[1.0, 0.0, 0.2, 0.7, 3.0, 1.0, -1.0, -2.0, 0.0, 1.0])
    better = [0, 3, 4, 6, 9]
    order = torch.tensor(better + [row ^ 1 for row in better])  # TRL's batches: all chosen, then all rejected
    logprobs, mask = policy[order], batch.completion_mask[order]
    outputs = SimpleNamespace(
        log_probs=logprobs,
        entropy=torch.zeros_like(logprobs),
        mean_logits=torch.zeros_like(logprobs),
        is_top1=torch.zeros_like(mask),
    )
    reference = batch.reference_logprobs.sum(1)[order]
    trainer = light_trainer(
        policy,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
    )
    with_prompt = torch.nn.functional.pad(mask.long(), (1, 0))
    inputs = {
        "input_ids": with_prompt,
        "attention_mask": torch.ones_like(with_prompt),
        "completion_mask": with_prompt,
        "ref_chosen_logps": reference[:5],
        "ref_rejected_logps": reference[5:],
    }
    loss = trainers.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (expected,) = torch.autograd.grad(loss, policy)
    own, gradient, _ = ours("dpo", policy, batch)
    assert_same(own, loss.detach())
    assert_same(gradient, expected * batch.completion_mask)


def test_sft_on_the_right_completions_is_trls_compute_loss_given_the_log_probs():
    trainers = pytest.importorskip("trl.trainer.sft_trainer")
    policy, batch = random_update(rewards=[1.0, 0.0, 0.0, 1.0] * 3)
    right = batch.rewards == 1
    mask = batch.completion_mask[right]
    outputs = SimpleNamespace(
        log_probs=policy[right] * mask, label_mask=mask, entropy=torch.zeros(1), is_top1=torch.zeros_like(mask)
    )
    trainer = light_trainer(policy, compute_loss_func=None, label_smoother=None)
    trainer.accelerator.parallelism_config = None
    trainer.args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    inputs = {"input_ids": mask.long(), "attention_mask": mask.long(), "labels": mask.long()}
    loss = trainers.SFTTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    (expected,) = torch.autograd.grad(loss, policy)
    own, gradient, _ = ours("sft", policy, batch)
    assert_same(own, loss.detach())
    assert_same(gradient, expected)


# -- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_grpo_is_its_definition_written_in_loops(kind):
    sizes = (3, 2)
    policy, batch = random_update(sizes, shift=0.6)
    losses = []
    for row, group in enumerate(batch.group_ids.tolist()):
        rewards = batch.rewards[batch.group_ids == group].tolist()
        scale = statistics.stdev(rewards) + 1e-4 if kind == "grpo" else 1.0
        advantage = (float(batch.rewards[row]) - statistics.mean(rewards)) / scale
        tokens = []
        for token in range(int(batch.lengths[row])):
            ratio = (policy[row, token] - batch.sampler_logprobs[row, token]).exp()
            bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
            to_reference = batch.reference_logprobs[row, token] - policy[row, token]
            k3 = to_reference.exp() - to_reference - 1
            tokens.append(-min(ratio * advantage, bounded * advantage) + BETA * k3)
        losses.append(sum(tokens) / (len(tokens) if kind == "grpo" else LONGEST))
    loss = sum(losses) / len(losses)
    (expected,) = torch.autograd.grad(loss, policy)
    own, gradient, clipped = ours(kind, policy, batch)
    assert_same(own, loss.detach())
    assert_same(gradient, expected)
    assert clipped


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient"), [(2.0, -2.0 * (1 + CLIP), 0.0), (0.0, 0.0, 0.0), (-2.0, math.inf, math.inf)]
)
@pytest.mark.parametrize("kind", ["policy_gradient", "grpo"])
def test_a_ratio_that_overflows_counts_only_where_clipping_leaves_it(kind, advantage, loss, gradient):
    """e^90 is inf in float32; inf * 0 and its gradient would be NaN. Beside it stands a usual one."""
    tokens = 100 if kind == "policy_gradient" else 1
    ratios = torch.tensor([90.0, 0.1])
    policy = torch.full((2, tokens), -1.0, requires_grad=True)
    sampler = policy.detach() - ratios[:, None] / tokens
    mask, advantages = torch.ones(2, tokens, dtype=torch.bool), torch.tensor([advantage, 1.0])
    options = {"clip": CLIP, "denominator": 1}
    if kind == "grpo":
        found = grpo_loss(policy, sampler, sampler, mask, advantages, beta=0.0, **options)
    else:
        found = policy_gradient_loss(policy, sampler, mask, advantages, **options)
    (own,) = torch.autograd.grad(found.loss, policy)
    rounded = 4 * tokens * torch.finfo(torch.float32).eps  # each token's log-probs of about -1, twice
    assert float(found.loss.detach()) == pytest.approx(loss - math.exp(0.1), rel=rounded)
    assert int(found.num_clipped) == (advantage > 0)
    assert_same(own, torch.tensor([[gradient], [-math.exp(0.1)]]).expand(2, tokens), rtol=rounded)


def test_on_policy_the_policy_gradient_is_gvpos_over_beta():
    """Completion by completion, not only on average: (R - beta l) centred is -d, and k / (k - 1) / k is 1 / (k - 1)."""
    policy, batch = random_update(shift=0.0)
    _, gradient, _ = ours("policy_gradient", policy, batch)
    _, gvpo, _ = ours("gvpo", policy, batch)
    assert gvpo.abs().max() > 0.01
    assert_same(gradient, gvpo / BETA)


def test_the_expected_policy_gradient_is_that_of_reward_minus_beta_kl():
    """On four responses, over all groups of two, each as often as the policy draws it: no Monte Carlo."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    rewards = torch.tensor([0.0, 1.0, 0.3, -0.5], dtype=torch.float64)
    probabilities = logits.softmax(0)
    kl = (probabilities * (probabilities.log() - reference)).sum()
    (expected,) = torch.autograd.grad(-((probabilities * rewards).sum() - BETA * kl), logits)
    total = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            logprobs = logits.log_softmax(0)[[i, j]][:, None]
            _, batch = random_update((2,))
            batch.completion_mask = torch.ones(2, 1, dtype=torch.bool)
            batch.rewards, batch.reference_logprobs = rewards[[i, j]], reference[[i, j]][:, None]
            batch.sampler_logprobs = logprobs.detach()
            objective = make_objective(ObjectiveSettings("policy_gradient"), BETA, LONGEST)
            (gradient,) = torch.autograd.grad(objective.loss(logprobs, batch, objective.terms(batch)).loss, logits)
            total += probabilities[i].detach() * probabilities[j].detach() * gradient
    assert_same(total, expected)


@pytest.mark.parametrize("covariance_term", [True, False])
@pytest.mark.parametrize("variance_term", [True, False])
def test_ablations_have_the_coefficients_of_the_terms_that_are_left(variance_term, covariance_term):
    sizes = (4, 3, 2)
    policy, batch = random_update(sizes)
    _, gradient, _ = ours("gvpo", policy, batch, variance_term=variance_term, covariance_term=covariance_term)
    expected = []
    columns = (batch.rewards, policy.detach().sum(1), batch.reference_logprobs.sum(1))
    for rewards, own, reference in zip(*(in_groups(column, sizes) for column in columns), strict=True):
        for i, k in enumerate([len(rewards)] * len(rewards)):
            centred = [values[i] - statistics.mean(values) for values in (rewards, own, reference)]
            coefficient = -BETA * centred[0] + BETA**2 * (variance_term * centred[1] - covariance_term * centred[2])
            expected.append(coefficient / (k - 1) / len(sizes))
    assert_same(gradient, torch.tensor(expected, dtype=torch.float64)[:, None] * batch.completion_mask)


def test_without_the_covariance_term_the_optimum_knows_no_reference_and_without_the_variance_term_there_is_none():
    reference = (torch.tensor([8, 4, 2, 1, 1], dtype=torch.float64) / 16).log()[:, None]
    rewards, group = torch.tensor([0.0, 1.0, 0.3, -0.5, 0.8], dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    mask = torch.ones(5, 1, dtype=torch.bool)

    def loss(logits, **terms):
        columns = (reference, mask, rewards, group, 0.5)
        return objectives.gvpo_rl_loss(logits.log_softmax(0)[:, None], *columns, **terms).loss

    best = rewards / 0.5
    assert float(loss(best, covariance_term=False)) == pytest.approx(-float(rewards.var()) / 2)
    logits = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, covariance_term=False), logits)
    assert_same(gradient, torch.zeros_like(gradient))
    assert float(loss(1e4 * (rewards + 0.5 * reference[:, 0]), variance_term=False)) < -1e3


def test_dpo_takes_all_pairs_of_a_group_and_the_mean_over_groups_that_have_some():
    sizes = (3, 2, 2)
    policy, batch = random_update(sizes, rewards=[1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 2.0])  # three pairs, none, one
    ratios = (policy - batch.reference_logprobs).sum(1).tolist()

    def pair(i, j):
        return math.log1p(math.exp(-BETA * (ratios[i] - ratios[j])))

    expected = ((pair(0, 1) + pair(0, 2) + pair(2, 1)) / 3 + pair(6, 5)) / 2
    own, gradient, _ = ours("dpo", policy, batch)
    assert float(own) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(gradient[3:5], torch.zeros_like(gradient[3:5]))


def test_sft_weights_tokens_with_rewards():
    policy, batch = random_update((2, 2), rewards=[0.5, 2.0, 0.0, 1.0])
    tokens = batch.completion_mask * batch.rewards[:, None]
    own, gradient, _ = ours("sft", policy, batch)
    assert_same(own, -(policy.detach() * tokens).sum() / tokens.sum())
    assert_same(gradient, -tokens / tokens.sum())


@pytest.mark.parametrize(("kind", "rewards"), [("sft", [0.0] * 4), ("dpo", [1.0] * 4)])
def test_an_update_in_which_nothing_counts_has_a_loss_and_gradient_of_zero(kind, rewards):
    policy, batch = random_update((2, 2), rewards=rewards)
    own, gradient, _ = ours(kind, policy, batch)
    assert float(own) == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    objective = make_objective(ObjectiveSettings(kind), BETA, LONGEST)
    assert objective.terms(batch).denominator == 0


@pytest.mark.parametrize("kind", ["gvpo", "grpo", "dr_grpo", "policy_gradient", "dpo", "sft"])
def test_dropped_completions_leave_their_group(kind):
    """Their rewards may be NaN; without them the loss is the same."""
    policy, batch = random_update((4, 4))
    dropped = torch.tensor([1, 6])
    batch.completion_mask[dropped] = False
    batch.rewards[dropped[0]] = math.nan
    loss, gradient, _ = ours(kind, policy, batch)
    rest = torch.tensor([0, 2, 3, 4, 5, 7])
    smaller = CompletionBatch(**{name: tensor[rest] for name, tensor in batch.state_dict().items()})
    part = policy.detach()[rest].requires_grad_()
    expected, its_gradient, _ = ours(kind, part, smaller)
    assert_same(loss, expected)
    assert_same(gradient[rest], its_gradient)
    assert torch.equal(gradient[dropped], torch.zeros_like(gradient[dropped]))


# -- length_exponent -------------------------------------------------------------------------------------------


def length_optimum(reference, rewards, scales, beta):
    """pi' exp((R - c) / (beta f)), with c by bisection: the sum falls strictly in it."""

    def policy(c):
        return (reference.log() + (rewards - c) / (beta * scales)).exp()

    low, high = float(rewards.min()) - 1, float(rewards.max()) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(policy(middle).sum()) > 1 else (low, middle)
    return policy(low)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, -0.5])
def test_the_optimum_with_a_length_exponent_is_the_derived_one(exponent):
    reference = torch.tensor([8, 4, 2, 1, 1], dtype=torch.float64) / 16
    rewards = torch.tensor([0.0, 1.0, 0.3, -0.5, 0.8], dtype=torch.float64)
    scales = torch.tensor([1.0, 2.0, 5.0, 3.0, 2.0], dtype=torch.float64) ** -exponent
    expected = length_optimum(reference, rewards, scales, 0.5)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-12)
    plain = torch.softmax(reference.log() + rewards / 0.5, 0)
    assert (float((expected - plain).abs().max()) < 1e-12) == (exponent == 0)
    logits = reference.log().clone().requires_grad_()
    ones, group = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.int64)

    def closure():
        logits.grad = None
        ratios = logits.log_softmax(0) - reference.log()
        loss = objectives.length_scaled_gvpo_loss(ratios, scales, ones, rewards, group, 0.5).loss
        loss.backward()
        return loss

    options = {"tolerance_grad": 1e-13, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    torch.optim.LBFGS([logits], max_iter=500, **options).step(closure)
    assert float(closure().detach()) < 1e-12
    assert_same(logits.detach().softmax(0), expected, atol=1e-6)


def test_lengths_are_the_completions_tokens():
    policy, batch = random_update((3, 2))
    _, gradient, _ = ours("gvpo", policy, batch, length_exponent=1.0)
    means = (policy - batch.reference_logprobs).sum(1) / batch.lengths
    losses = []
    for rows in (slice(0, 3), slice(3, 5)):
        residuals = BETA * (means[rows] - means[rows].mean()) - (batch.rewards[rows] - batch.rewards[rows].mean())
        losses.append(residuals.square().sum() / (2 * (len(residuals) - 1)))
    (expected,) = torch.autograd.grad(sum(losses) / 2, policy)
    assert_same(gradient, expected * batch.completion_mask)


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ppo"}, "objective must be one of"),
        ({"kind": "dpo", "clip": 0.1}, r"objective\.clip belongs to the kinds .*, got 0\.1 with 'dpo'"),
        ({"kind": "dpo", "clip": 0.2}, r"objective\.clip belongs to the kinds .*, got 0\.2 with 'dpo'"),
        (
            {"clip": 0.2},
            r"--model\.objective\.kind grpo --model\.objective\.clip 0\.2, or .*\{kind: grpo, clip: 0\.2\}",
        ),
        ({"kind": "grpo", "variance_term": False}, r"objective\.variance_term belongs"),
        ({"kind": "grpo", "covariance_term": True}, r"objective\.covariance_term belongs"),
        ({"kind": "dpo", "length_exponent": 0.0}, r"objective\.length_exponent belongs"),
        ({"kind": "rloo"}, "got 'rloo'; RLOO is 'policy_gradient'"),
        ({"kind": "sft", "length_exponent": 1.0}, r"objective\.length_exponent belongs"),
        ({"kind": "grpo", "clip": 0.0}, r"objective\.clip must be > 0, got 0\.0"),
        ({"length_exponent": 1.0, "covariance_term": False}, r"length_exponent=1\.0 needs both terms"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**settings)


def test_settings_that_are_left_out_are_the_usual_ones_of_the_kind():
    assert ObjectiveSettings() == ObjectiveSettings("gvpo", None, True, True, 0.0)
    assert ObjectiveSettings("dr_grpo") == ObjectiveSettings("dr_grpo", 0.2)
    assert (ObjectiveSettings("sft").clip, ObjectiveSettings("grpo").variance_term) == (None, None)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "gvpo"),
        ({"variance_term": True}, "gvpo"),
        ({"covariance_term": False}, "gvpo (covariance_term: False)"),
        ({"length_exponent": 0.5}, "gvpo (length_exponent: 0.5)"),
        ({"kind": "grpo", "clip": 0.2}, "grpo"),
        ({"kind": "grpo", "clip": 0.3}, "grpo (clip: 0.3)"),
        ({"kind": "dpo"}, "dpo"),
    ],
)
def test_an_objectives_name_says_what_is_unusual(settings, shown):
    objective = ObjectiveSettings(**settings)
    assert str(objective) == shown
    assert objective.is_gvpo == (shown == "gvpo")


@pytest.mark.parametrize("kind", ["gvpo", "dpo", "grpo", "dr_grpo", "policy_gradient", "sft"])
def test_beta_may_be_zero_where_the_pull_is_a_term_of_its_own(kind):
    if kind in ("gvpo", "dpo"):
        with pytest.raises(ValueError, match=r"beta must be > 0, got 0\.0"):
            make_objective(ObjectiveSettings(kind), 0.0, LONGEST)
    else:
        make_objective(ObjectiveSettings(kind), 0.0, LONGEST)
    with pytest.raises(ValueError, match="beta must be > 0"):
        make_objective(ObjectiveSettings(kind), -0.1, LONGEST)
