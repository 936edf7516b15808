"""Every objective through the Trainer: its updates, its settings, its metrics and its checkpoints."""

import itertools
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from gvpo_lightning import ObjectiveSettings, SourceSettings
from gvpo_lightning.callbacks import OptimalityMeter
from gvpo_lightning.cli import main
from gvpo_lightning.objectives import make_objective
from gvpo_lightning.policy.head import Scoring, completion_logprobs
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.sources.settings import DemonstrationSettings, ReplaySettings
from tests.error_budget import assert_within
from tests.update_budget import scores_budget, sgd_update
from tests.watching import on_update

OBJECTIVES = {
    "no variance term": ObjectiveSettings(variance_term=False),
    "no covariance term": ObjectiveSettings(covariance_term=False),
    "length": ObjectiveSettings(length_exponent=0.5),
    **{kind: ObjectiveSettings(kind) for kind in ("grpo", "dr_grpo", "policy_gradient", "dpo", "sft")},
}
COUPLED = ("no variance term", "no covariance term", "length", "dpo")
SIZES = {"group_size": 4, "prompts_per_rollout": 6, "prompts_per_update": 3, "epochs_per_rollout": 2}
LR = 0.5


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR)


def patchy(prompts, completions, **columns):
    """Varied, not negative; some have none."""
    return [None if len(text) % 3 == 1 else sum(c in "56789" for c in text) / 4 for text in completions]


def record(module, weights):
    """The weights before each update, and its rollout and rows."""
    found = []
    on_update(module, lambda update, rollout: found.append((weights(module), rollout, update.rows)))
    return found


def one_big_batch(module, values, rollout, rows):
    """An update at the given weights, in float64."""
    torch.nn.utils.vector_to_parameters(values, module.policy.parameters())
    objective = make_objective(module.objective_settings, module.beta, module.generation.max_new_tokens)
    batch = rollout.micro_batch(rows, torch.device("cpu"))
    return sgd_update(
        module.policy, batch, lambda values, part: objective.loss(values, part, objective.terms(part)).loss, LR
    )


@pytest.mark.parametrize(
    ("name", "padding_free"), [*((name, False) for name in OBJECTIVES), ("grpo", True), ("dpo", True)]
)
def test_updates_cut_into_micro_batches_are_those_of_one_big_batch(make_module, fit, weights, name, padding_free):
    rollout = RolloutSettings(**SIZES, micro_batch_size=3)
    module = make_module(
        objective=OBJECTIVES[name], rollout=rollout, reward=patchy, optimizer=sgd, padding_free=padding_free
    )
    found, losses = record(module, weights), []
    module.log_dict = lambda metrics, **_: losses.append(float(metrics["loss"])) if "loss" in metrics else None
    passes = []
    module.guard.info = lambda name, _: passes.append(name)
    fit(module, max_steps=4, accumulate_grad_batches=5)
    states = [values for values, _, _ in found] + [weights(module)]
    assert len(losses) == len(found) == 4
    for (before, after), (_, rolled, rows), logged in zip(itertools.pairwise(states), found, losses, strict=True):
        update = one_big_batch(module, before, rolled, rows)
        expected, budget = (
            torch.cat([value.flatten() for value in values.values()]) for values in (update.weights, update.budgets)
        )
        assert_within(after, expected, budget)
        assert (expected - before).abs().max() > 1e-4 * LR
        assert_within(logged, update.loss, update.loss_budget)
    assert ("two passes" in passes) == (name in COUPLED)


def test_an_adapter_is_trained_alike_whole_and_cut(make_module, fit, tiny_policy, tokenizer, tmp_path):
    pytest.importorskip("peft")
    tiny_policy(3).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trained = []
    for limit, accumulate in ((None, 1), (3, 5)):
        module = make_module(
            policy=str(tmp_path / "base"),
            lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            objective="grpo",
            optimizer=sgd,
            rollout=RolloutSettings(**SIZES, micro_batch_size=limit),
        )
        # in float64, where the order of sums makes no difference that three updates could amplify
        fit(module, max_steps=3, accumulate_grad_batches=accumulate, precision="64-true")
        trained.append(torch.cat([p.detach().flatten() for n, p in module.policy.named_parameters() if "lora_B" in n]))
    assert trained[0].abs().max() > 1e-3  # they start at 0
    assert trained[0].dtype == torch.float64
    torch.testing.assert_close(trained[1], trained[0], atol=1e-8, rtol=0)  # the norms are float32's


def test_gvpo_by_any_name_is_the_same_run_to_the_bit(make_module, fit, weights):
    default, named = make_module(), make_module(objective=ObjectiveSettings("gvpo"))
    fit(default, max_steps=2)
    fit(named, max_steps=2)
    assert torch.equal(weights(default), weights(named))
    assert default.rollout.batch.sampler_logprobs is None


def test_sampler_logprobs_are_those_of_the_policy_at_the_rollouts_start(make_module, fit, weights):
    module = make_module(objective="grpo", rollout=RolloutSettings(**SIZES))
    found = record(module, weights)
    trainer = fit(module, max_steps=8)
    for start in (0, 4):  # of each rollout
        values, rollout, _ = found[start]
        torch.nn.utils.vector_to_parameters(values, module.policy.parameters())
        expected, _ = completion_logprobs(module.policy, rollout.batch, Scoring(implementation="reference"))
        assert_within(rollout.batch.sampler_logprobs, expected, scores_budget(module.policy, rollout.batch))
    assert not torch.allclose(found[4][1].batch.sampler_logprobs, found[4][1].batch.reference_logprobs, atol=1e-3)
    assert 0 <= float(trainer.callback_metrics["objective/clip_fraction"]) <= 1


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_without_a_pull_nothing_is_said_of_implicit_rewards(make_module, fit, kind):
    logged = fit(make_module(objective=kind, beta=0.0), max_steps=2).callback_metrics
    assert {"loss", "reward/mean", "log_ratio/policy/mean", "kl/reference", "entropy"} <= logged.keys()
    assert not any(name.startswith(("residual/", "implicit_reward/")) for name in logged)
    assert all(math.isfinite(float(logged[name])) for name in ("loss", "kl/reference"))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "policy_gradient"])
@pytest.mark.parametrize(
    "sources",
    [SourceSettings(replay=ReplaySettings(2)), SourceSettings(demonstrations=DemonstrationSettings("answer"))],
)
def test_ratios_to_the_sampler_need_the_policys_own_samples(make_module, kind, sources):
    with pytest.raises(ValueError, match=rf"objective: {kind} trains on the current policy's own .* got sources"):
        make_module(objective=kind, sources=sources)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_dpo_and_sft_take_any_mixture(make_module, fit, kind):
    sources = SourceSettings(demonstrations=DemonstrationSettings("answer"))
    module = make_module(objective=kind, sources=sources)
    fit(module, max_steps=2)
    assert module.run.num_updates == 2
    assert module.run.skipped_updates == 0


def test_another_sampler_than_the_policy_is_warned_of(make_module, fit):
    generation = GenerationSettings(max_new_tokens=4, temperature=0.7)
    with pytest.warns(UserWarning, match=r"grpo takes completions to be the policy's at model\.temperature=1\.0"):
        fit(make_module(objective="grpo", generation=generation), max_steps=1)


@pytest.mark.parametrize(
    ("kind", "said"), [("gvpo", "GVPO's optimum is then not unique"), ("dpo", "that is not trained")]
)
def test_a_sampler_that_cuts_takes_from_each_objective_its_own(make_module, fit, kind, said):
    generation = GenerationSettings(max_new_tokens=4, top_k=3)
    with pytest.warns(UserWarning, match=f"never draws some of what the reference allows: {said}"):
        fit(make_module(objective=kind, generation=generation), max_steps=1)


PREDICTED = {
    "gvpo": (ObjectiveSettings(), True),
    "policy_gradient": (ObjectiveSettings("policy_gradient"), True),
    "dr_grpo": (ObjectiveSettings("dr_grpo"), True),
    **{name: (OBJECTIVES[name], False) for name in ("no variance term", "length", "grpo", "dpo", "sft")},
}


@pytest.mark.parametrize("name", PREDICTED)
def test_an_accuracy_is_predicted_only_where_the_optimum_is_known(make_module, fit, name):
    objective, is_predicted = PREDICTED[name]
    meter = OptimalityMeter()
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
    loader = DataLoader(rows, batch_size=4, collate_fn=list)
    fit(make_module(objective=objective), val_dataloaders=loader, callbacks=[meter], max_steps=1, limit_val_batches=1)
    assert (meter.predicted is not None) == is_predicted
    assert meter.reached is not None


def test_negative_rewards_are_no_weights(make_module, fit):
    module = make_module(objective="sft", reward=lambda prompts, completions, **_: [-0.25] * len(completions))
    with pytest.raises(ValueError, match=r"which must be >= 0, got -0\.25"):
        fit(module, max_steps=1)


def negative(prompts, completions, **columns):
    return [-0.25 * len(text) for text in completions]


def test_negative_rewards_of_a_rollout_that_is_resumed_are_no_weights_either(make_module, fit, tmp_path):
    rollout = RolloutSettings(**SIZES)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_module(rollout=rollout, reward=negative), callbacks=[saver], enable_checkpointing=True, max_steps=1)
    module = make_module(rollout=rollout, reward=negative, objective="sft")
    with pytest.raises(ValueError, match="which must be >= 0, got -"):
        fit(module, ckpt_path=tmp_path / "step=1.ckpt", max_steps=2)


def small(prompts, completions, **columns):
    return [0.001 * sum(c in "56789" for c in text) for text in completions]


@pytest.mark.parametrize("name", ["length", "grpo", "policy_gradient", "dpo"])
def test_what_does_not_train_gvpos_residual_is_not_said_to_explode(make_module, fit, name):
    """beta l is far from rewards of thousandths after a few steps of Adam, whatever is well or not."""
    rollout = RolloutSettings(**SIZES)
    module = make_module(objective=OBJECTIVES[name], reward=small, rollout=rollout, beta=5.0)
    said = []
    module.guard.say = lambda what, _: said.append(what)
    logged = fit(module, max_steps=4).callback_metrics
    assert float(logged["residual/rms"]) > 10 * float(logged["reward/spread"])
    assert "exploding" not in said


def test_a_penalty_to_the_policy_that_has_sampled_is_refused(make_module):
    with pytest.raises(ValueError, match=r"previous and beta=0\.5: .* always 0\. Set reference: frozen, or beta: 0"):
        make_module(objective="policy_gradient", reference="previous", beta=0.5)
    make_module(objective="policy_gradient", reference="previous", beta=0.0)
    make_module(objective="grpo", reference="previous", beta=0.5)


@pytest.mark.parametrize("overlaid", [False, True])
def test_a_setting_beside_a_kinds_bare_name_is_refused_and_not_taken_for_gvpos(tmp_path, capsys, overlaid):
    settings = ["--model.objective=grpo", "--model.objective.clip=0.2"]
    if overlaid:
        for number, value in enumerate(("grpo", "{clip: 0.2}")):
            (tmp_path / f"{number}.yaml").write_text(f"model: {{objective: {value}}}")
            settings[number] = f"--config={tmp_path / f'{number}.yaml'}"
    with pytest.raises(SystemExit):
        main(["debug-batch", "--model.policy=none", "--batch=none", *settings])
    assert "--model.objective.kind grpo --model.objective.clip 0.2, or" in capsys.readouterr().err


def test_an_update_in_which_nothing_is_right_moves_nothing(make_module, fit, weights):
    module = make_module(objective="sft", reward=lambda prompts, completions, **_: [0.0] * len(completions))
    before = weights(module)
    fit(module, max_steps=2)  # AdamW's weight decay would move them
    assert torch.equal(weights(module), before)
    assert module.run.skipped_updates == 0


@pytest.mark.parametrize("kind", ["policy_gradient", "dpo"])
def test_a_half_trained_rollout_goes_on_as_if_nothing_had_happened(make_module, fit, weights, tmp_path, kind):
    settings = {"objective": kind, "rollout": RolloutSettings(**SIZES)}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    through, resumed = make_module(**settings), make_module(1, **settings)
    fit(through, callbacks=[saver], enable_checkpointing=True, max_steps=6)
    fit(resumed, ckpt_path=tmp_path / "step=3.ckpt", max_steps=6)
    assert torch.equal(weights(resumed), weights(through))


def test_a_run_may_go_on_with_another_objective_unless_it_lacks_what_that_needs(make_module, fit, tmp_path):
    rollout = RolloutSettings(**SIZES)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(make_module(rollout=rollout), callbacks=[saver], enable_checkpointing=True, max_steps=3)
    fit(make_module(rollout=rollout, objective="dpo"), ckpt_path=tmp_path / "step=3.ckpt", max_steps=5)
    with pytest.raises(ValueError, match="grpo needs log-probs of the policy that has sampled a rollout"):
        fit(make_module(rollout=rollout, objective="grpo"), ckpt_path=tmp_path / "step=3.ckpt", max_steps=5)


def test_the_update_that_a_run_stopped_at_can_be_looked_into(
    make_module, fit, tiny_policy, tokenizer, tmp_path, capsys
):
    tiny_policy().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = make_module(objective="grpo", max_skipped_updates=0, max_log_ratio=1e-3, optimizer=sgd)
    with pytest.raises(RuntimeError, match="in a row"):
        fit(module)
    arguments = [
        "debug-batch",
        f"--model.policy={tmp_path / 'model'}",
        "--model.reward=gvpo_lightning.rewards.ExactAnswer",
        f"--batch={tmp_path / 'offending_update_rank0.pt'}",
    ]
    main([*arguments, "--model.objective=grpo"])
    assert "objective grpo" in capsys.readouterr().out
    for others, named in (([], "gvpo"), (["--model.objective={kind: grpo, clip: 0.3}"], "grpo (clip: 0.3)")):
        with pytest.raises(SystemExit):
            main([*arguments, *others])
        assert f"is an update of objective: grpo, the config says {named}" in capsys.readouterr().err
