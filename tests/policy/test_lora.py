"""An adapter from the settings: what is trained, what it is measured against, what a checkpoint holds of it."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from gvpo_lightning import GVPOModule, LoadingSettings, ReferenceSettings
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.lora import lora_config
from gvpo_lightning.reference.kinds import AdapterOffReference, ModelReference
from tests.error_budget import assert_within
from tests.export.exporting import export
from tests.update_budget import scores_budget
from tests.watching import rollouts_of

pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture
def base(tiny_policy, tokenizer, tmp_path):
    """A folder with a small model and its tokenizer."""
    folder = tmp_path / "base"
    tiny_policy(3, hidden_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_loading(quantization, dtype="float32"):
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    return LoadingSettings(dtype, quantization=quantization)


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "nf4")])
def test_the_frozen_reference_is_the_policy_without_its_adapter_to_the_bit(make_module, fit, base, dtype, quantization):
    settings = {"policy": base, "lora": LORA, "loading": make_loading(quantization, dtype)}
    free = make_module(**settings)
    beside = make_module(reference=ReferenceSettings(model=base), **settings)
    runs = [rollouts_of(free), rollouts_of(beside)]
    for module in (free, beside):
        fit(module, max_steps=6)
    assert isinstance(free.reference, AdapterOffReference)
    assert isinstance(beside.reference, ModelReference)
    for rollout, other in zip(*runs, strict=True):
        assert torch.equal(rollout.batch.reference_logprobs, other.batch.reference_logprobs)
    trained = {p.dtype for p in free.policy.parameters() if p.requires_grad}
    frozen = {p.dtype for p in free.policy.parameters() if not p.requires_grad}
    of_matrices = {torch.uint8} if quantization else set()
    assert (trained, frozen) == ({torch.float32}, {getattr(torch, dtype)} | of_matrices)
    moved = [p.abs().max() for n, p in free.policy.named_parameters() if "lora_B" in n]
    assert min(moved) > 0  # they start at 0


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_bf16_true_run_measures_against_the_same_numbers(make_module, fit, base, quantization):
    settings = {"policy": base, "lora": LORA, "loading": make_loading(quantization, "bfloat16")}
    free, beside = make_module(**settings), make_module(reference=ReferenceSettings(model=base), **settings)
    runs = [rollouts_of(free), rollouts_of(beside)]
    for module in (free, beside):
        with pytest.warns(UserWarning, match="has cast the adapter to 16 bits"):
            fit(module, max_steps=4, precision="bf16-true")
    for rollout, other in zip(*runs, strict=True):
        assert torch.equal(rollout.batch.reference_logprobs, other.batch.reference_logprobs)


@pytest.mark.parametrize(("quantization", "checkpointing"), [(None, True), ("nf4", True), ("int8", False)])
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_bitwise(
    make_module, fit, weights, base, tmp_path, quantization, checkpointing
):
    settings = {"policy": base, "lora": LORA, "gradient_checkpointing": checkpointing}
    settings["loading"] = make_loading(quantization)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    through = make_module(**settings)
    fit(through, max_steps=6, callbacks=[saver], enable_checkpointing=True)
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    torch.manual_seed(7)  # the adapter's own seed is the run's
    resumed = make_module(**settings)
    fit(resumed, max_steps=6, ckpt_path=tmp_path / "step=3.ckpt")
    assert torch.equal(weights(resumed), weights(through))
    with pytest.raises(ValueError, match=r"The checkpoint's adapter is another one.*Set model\.lora as it was"):
        fit(make_module(**settings | {"lora": LORA | {"r": 2}}), ckpt_path=tmp_path / "step=3.ckpt")


def test_a_checkpoint_of_another_adapter_or_model_is_refused_wherever_it_is_loaded(
    make_module, fit, base, prompts, tiny_policy, tokenizer, tmp_path
):
    other = tmp_path / "other"
    tiny_policy(4, hidden_size=64).save_pretrained(other)
    tokenizer.save_pretrained(other)
    checkpoint, settings = tmp_path / "a.ckpt", {"policy": base, "lora": LORA, "reference": "previous"}
    fit(make_module(**settings), max_steps=2).save_checkpoint(checkpoint)
    cases = {
        r"trained with lora_alpha=8, the policy's has lora_alpha=16": {"lora": LORA | {"lora_alpha": 16}},
        r"with use_rslora=False, .* use_rslora=True": {"lora": LORA | {"use_rslora": True}},
        r"with alpha_pattern={}, .*{'q_proj': 1}": {"lora": LORA | {"alpha_pattern": {"q_proj": 1}}},
        r"trained on another model than the policy's \(fingerprint": {"policy": str(other)},
        r"the policy has none: set model\.lora as in training": {"lora": None},
    }
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for message, changed in cases.items():
        with pytest.raises(ValueError, match=message):
            fit(make_module(**settings | changed), ckpt_path=checkpoint)
        for run in (trainer.validate, trainer.predict):
            module = make_module(**settings | changed)
            with pytest.raises(ValueError, match=message):
                run(module, DataLoader(prompts[:2], batch_size=2, collate_fn=list), ckpt_path=checkpoint)
        for merge in (False, True):  # alone, the model beneath is not loaded
            if changed == {"lora": None} or ("policy" in changed and not merge):
                continue
            with pytest.raises(ValueError, match=message):
                export(make_module(**settings | changed), checkpoint, tmp_path / "out", merge_adapter=merge)
    export(make_module(**settings), checkpoint, tmp_path / "out", merge_adapter=True)


def test_the_adapter_starts_from_the_runs_seed(make_module, base):
    def start(seed):
        L.seed_everything(seed, verbose=False)
        torch.manual_seed(torch.seed())  # whatever else has drawn
        module = make_module(policy=base, lora=LORA)
        module.configure_model()
        return torch.cat([p.flatten() for n, p in module.policy.named_parameters() if "lora_A" in n])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_an_exported_adapter_is_trained_further_and_is_its_own_reference(make_module, fit, base, tmp_path):
    first = make_module(policy=base, lora=LORA)
    fit(first, max_steps=4)
    first.export(tmp_path / "export")
    second = make_module(policy=str(tmp_path / "export"))
    rollouts = rollouts_of(second)
    fit(second, max_steps=4)
    start = score(first.policy, rollouts[-1].batch, Scoring(1.0), batch_size=64)
    assert_within(rollouts[-1].batch.reference_logprobs, start, scores_budget(first.policy, rollouts[-1].batch))
    names = [n for n, p in second.policy.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n for n in names)
    moved = dict(second.policy.named_parameters())
    assert max((moved[n] - p).abs().max() for n, p in first.policy.named_parameters() if "lora_" in n) > 0
    with pytest.raises(ValueError, match=r"is an adapter already, of .*base'"):
        make_module(policy=str(tmp_path / "export"), lora=LORA)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 4}}, r"model\.lora\.rank is no argument of peft\.LoraConfig"),
        ({"lora": {"r": "four"}}, r'model\.lora=.* Parser key "r"'),
        ({"lora": {"r": 0}}, r"model\.lora\.r must be > 0, got 0"),
        ({"lora": {"lora_dropout": 0.1}}, r"lora_dropout must be 0, got 0\.1"),
        ({"lora": {"init_lora_weights": "pissa"}}, r"init_lora_weights must be one of .* got 'pissa'"),
        ({"lora": {"init_lora_weights": "pissa_niter_4"}}, r"init_lora_weights must be one of .* got 'pissa_niter_4'"),
        ({"lora": {"init_lora_weights": "loftq"}}, r"init_lora_weights must be one of .* got 'loftq'"),  # needs scipy
        ({"lora": {"bias": "lora"}}, r'model\.lora=.* Parser key "bias"'),
        ({"quantization": "nf4"}, r"quantization='nf4' needs an adapter"),
    ],
)
def test_settings_that_make_no_adapter_are_refused_before_anything_is_loaded(make_module, base, settings, message):
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
        settings = {"loading": LoadingSettings(**settings)}
    with pytest.raises(ValueError, match=message) as refused:
        make_module(policy=base, **settings)
    assert "\n" not in str(refused.value)


def test_numbers_and_switches_in_quotes_are_what_they_say():
    config = lora_config({"r": "4", "lora_alpha": "16", "use_rslora": "false", "target_modules": "all-linear"})
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 16, False)
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize("lora", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_is_refused(make_module, base, lora):
    with pytest.raises(ValueError, match="leave lm_head out"):
        make_module(policy=base, lora=lora).configure_model()


def test_modules_that_the_model_has_not_are_named(make_module, base):
    with pytest.raises(ValueError, match=r"does not fit Qwen2ForCausalLM: Target modules .*c_attn"):
        make_module(policy=base, lora={"target_modules": ["c_attn"]})


@pytest.mark.parametrize("settings", [{"lora": LORA}, {"loading": LoadingSettings("bfloat16")}])
def test_a_model_object_brings_its_own_adapter_and_dtype(make_module, settings):
    with pytest.raises(ValueError, match=r"is for a policy given by name, got a Qwen2ForCausalLM"):
        make_module(**settings)


def test_a_policy_that_is_not_there_is_named_as_the_policy(base):
    with pytest.raises(ValueError, match=r"^policy='.*base-typo' is neither a folder with a model nor a hub id"):
        GVPOModule(f"{base}-typo", lambda prompts, completions: [0.0])
