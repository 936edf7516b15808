"""What the policy is measured against: each kind's weights, memory, checkpoint and resume."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gvpo_lightning.policy.head import Scoring
from gvpo_lightning.reference.settings import ReferenceSettings
from gvpo_lightning.sources.settings import ReplaySettings, SourceSettings
from tests.error_budget import assert_within, sum_budget
from tests.update_budget import scores_budget
from tests.watching import on_rollout, rollouts_of

EVERY_3, EMA = ReferenceSettings("every_n_steps", every_n_steps=3), ReferenceSettings("ema", decay=0.75)


def with_lora(policy, seed=0):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    return peft.get_peft_model(policy, config)


@pytest.fixture
def make_policy(tiny_policy):
    """A whole policy or one with LoRA."""

    def build(kind: str, seed: int = 0):
        policy = tiny_policy(0 if kind == "lora" else seed)
        return with_lora(policy, seed) if kind == "lora" else policy

    return build


def trained(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}


def traced(module):
    """The policy's and the reference's weights at the start of each rollout, and the log-probs it was given."""
    trace, policies = [], []

    def after(rollout):
        policy = policies[-1]
        with module.reference.applied(module.policy):
            reference = trained(module)
        assert all(torch.equal(policy[name], value) for name, value in trained(module).items())  # put back
        trace.append((policy, reference, rollout.batch.reference_logprobs, module.reference.version))

    on_rollout(module, lambda index: policies.append(trained(module)), after)
    return trace


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_every_n_steps_is_renewed_at_the_first_rollout_after_n(make_module, fit, make_policy, kind):
    module = make_module(policy=make_policy(kind), reference=EVERY_3)
    trace = traced(module)
    fit(module, max_steps=12)  # a rollout every 2 updates: renewed after 4 and 8
    policies, references = [t[0] for t in trace], [t[1] for t in trace]
    for rollout, source in enumerate([0, 0, 2, 2, 4, 4]):
        assert all(torch.equal(references[rollout][name], value) for name, value in policies[source].items())
    assert [t[3] for t in trace] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_ema_is_the_average_that_its_formula_says(make_module, fit, make_policy, kind):
    module = make_module(policy=make_policy(kind), reference=EMA)
    trace = traced(module)
    fit(module, max_steps=8)
    expected = {name: value.double() for name, value in trace[0][0].items()}
    size = max(float(value.abs().max()) for policy, *_ in trace for value in policy.values())
    budget = sum_budget(size, roundings=12)  # three an average, of which the next one keeps three quarters
    for policy, reference, _, _ in trace:
        expected = {name: 0.75 * expected[name] + 0.25 * policy[name].double() for name in expected}
        for name, value in expected.items():
            assert_within(reference[name], value, budget, name)
    assert [t[3] for t in trace] == [0, 1, 2, 3]


def test_adapter_off_is_the_base_model(make_module, fit, make_policy):
    module = make_module(policy=make_policy("lora"), reference="adapter_off")
    base = make_module(seed=0)
    trace = traced(module)
    rollouts = rollouts_of(module)
    fit(module, max_steps=6)
    base.configure_model()
    from gvpo_lightning.policy.head import score

    for rollout in rollouts:
        expected = score(base.policy, rollout.batch, Scoring(1.0), batch_size=64)
        assert_within(rollout.batch.reference_logprobs, expected, scores_budget(base.policy, rollout.batch))
    assert trace[0][3] == trace[-1][3] == 0


def test_adapter_off_without_an_adapter_is_refused(make_module, fit):
    with pytest.raises(ValueError, match="adapter_off needs a policy with an adapter, got a plain Qwen2ForCausalLM"):
        fit(make_module(reference="adapter_off"))


@pytest.mark.parametrize(
    ("reference", "kind", "share"),
    [
        ("frozen", "whole", 1),
        ("frozen", "lora", 1),
        (EVERY_3, "whole", 1),
        (EMA, "lora", 1),
        ("previous", "whole", 0),
        ("adapter_off", "lora", 0),
    ],
)
def test_a_reference_holds_the_trained_weights_once_or_nothing(make_module, fit, make_policy, reference, kind, share):
    module = make_module(policy=make_policy(kind), reference=reference)
    fit(module, max_steps=2)
    held = sum(value.numel() for value in getattr(module.reference, "weights", {}).values())
    assert held == share * sum(value.numel() for value in trained(module).values())
    assert not [m for m in vars(module.reference).values() if isinstance(m, torch.nn.Module)]


def test_another_model_can_be_the_frozen_reference(make_module, fit, tiny_policy, tokenizer, tmp_path):
    tiny_policy(7, hidden_size=16).save_pretrained(tmp_path / "other")
    settings = ReferenceSettings(model=str(tmp_path / "other"))
    module = make_module(reference=settings)
    fit(module, max_steps=2)
    from gvpo_lightning.policy.head import score
    from gvpo_lightning.policy.prepare import load_policy

    batch = module.rollout.batch
    expected = score(load_policy(str(tmp_path / "other")), batch, Scoring(1.0), batch_size=64)
    assert torch.equal(batch.reference_logprobs, expected)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            {"vocab_size": 12},
            r"reference\.model='.*other' has 12 token ids, fewer than the policy's \d+: .*Take a model",
        ),
        (
            {"max_position_embeddings": 7},
            r"other': Row \d+: the prompt's . tokens and .*=4 exceed the model's context of 7",
        ),
    ],
)
def test_another_model_that_cant_score_the_policys_completions_is_refused(
    make_module, fit, tiny_policy, tmp_path, size, message
):
    tiny_policy(7, **size).save_pretrained(tmp_path / "other")
    module = make_module(reference=ReferenceSettings(model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=message):
        fit(module, max_steps=2)
    assert module.reference.model is None  # it was not loaded


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_run_against_another_model_resumes_bitwise(make_module, fit, weights, tiny_policy, tmp_path, precision):
    tiny_policy(7).save_pretrained(tmp_path / "other")
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"reference": ReferenceSettings(model=str(tmp_path / "other"))}
    through = make_module(**settings)
    fit(through, callbacks=[saver], enable_checkpointing=True, max_steps=6, precision=precision)
    resumed = make_module(seed=5, **settings)
    fit(resumed, ckpt_path=tmp_path / "step=3.ckpt", max_steps=6, precision=precision)
    assert torch.equal(weights(resumed), weights(through))


def test_replayed_log_probs_of_another_precision_are_computed_anew(make_module, fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"sources": SourceSettings(replay=ReplaySettings(2))}
    fit(make_module(**settings), callbacks=[saver], enable_checkpointing=True, max_steps=6)
    for precision, versions in (("32-true", {0}), ("bf16-mixed", {-1})):
        module = make_module(**settings)
        fit(module, ckpt_path=tmp_path / "step=6.ckpt", max_steps=7, precision=precision)
        stored = module.sources.replay.state_dict()["versions"][: 24 * 4]
        assert set(stored) == versions


@pytest.mark.parametrize(
    ("reference", "kind"),
    [(EVERY_3, "whole"), (EVERY_3, "lora"), (EMA, "whole"), (EMA, "lora"), ("adapter_off", "lora"), ("frozen", "lora")],
)
@pytest.mark.parametrize("stop", [4, 5])
def test_every_kind_resumes_bitwise(make_module, fit, make_policy, weights, tmp_path, reference, kind, stop):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"reference": reference, "sources": SourceSettings(replay=ReplaySettings(2))}
    through = make_module(policy=make_policy(kind), **settings)
    fit(through, callbacks=[saver], enable_checkpointing=True, max_steps=10)
    torch.manual_seed(99)
    resumed = make_module(policy=make_policy(kind, seed=5), **settings)
    fit(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt", max_steps=10)
    assert torch.equal(weights(resumed), weights(through))
    assert resumed.reference.version == through.reference.version


def test_a_checkpoint_of_another_kind_of_reference_is_refused(make_module, fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_module(reference=EMA), max_steps=2, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(ValueError, match="trained with reference: ema, the settings say frozen"):
        fit(make_module(), ckpt_path=tmp_path / "step=2.ckpt", max_steps=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mine"}, "reference must be one of"),
        ({"kind": "ema"}, r"reference\.decay must be in \(0, 1\), got None"),
        ({"kind": "ema", "decay": 1.0}, r"reference\.decay must be in \(0, 1\), got 1\.0"),
        ({"kind": "every_n_steps"}, r"reference\.every_n_steps must be at least 1, got None"),
        ({"kind": "previous", "decay": 0.5}, r"reference\.decay belongs to the kinds \('ema',\), got 0\.5"),
        ({"kind": "ema", "decay": 0.5, "model": "x"}, r"reference\.model belongs to"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReferenceSettings(**arguments)
