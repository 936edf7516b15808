"""Adapters of every kind: exported and loaded again they are what was trained, or a setting is refused by its name."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_lightning.export.compare import check_adapter_written
from gvpo_lightning.export.folder import write_adapter
from gvpo_lightning.policy.source import PolicySource
from tests.error_budget import assert_within, logprob_budget
from tests.export.exporting import export

peft = pytest.importorskip("peft")
IDS = torch.tensor([[3, 4, 5, 6, 1], [7, 2, 9, 10, 11]])
MODELS = {
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "gemma3-tied": {"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False},
    "gpt2-tied": {"model_type": "gpt2", "tie_word_embeddings": True},  # Conv1D, and other names
}
TO_GPT2 = {"q_proj": "c_attn", "v_proj": "c_proj", "embed_tokens": "wte", "norm": "ln_f"}
QV = {"target_modules": ["q_proj", "v_proj"]}
EMBEDDINGS = {"target_modules": ["q_proj", "embed_tokens"]}
TRAINED = {
    "all-linear": {"target_modules": "all-linear"},
    "default": {},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "embeddings-beside-others": EMBEDDINGS,
    "embeddings-by-regex": {"target_modules": r".*\.(embed_tokens|v_proj)"},
    "embeddings-dora": EMBEDDINGS | {"use_dora": True},
    "embeddings-rank": EMBEDDINGS | {"rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"q_proj": 32}},
    "embeddings-saved": QV | {"modules_to_save": ["embed_tokens"]},
    "norm-saved": QV | {"modules_to_save": ["norm"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "layers": QV | {"layers_to_transform": [1]},
    "excluded": QV | {"exclude_modules": ["v_proj"]},
    "rslora": QV | {"use_rslora": True},
    "dora": QV | {"use_dora": True},
    "bias-all": QV | {"bias": "all"},
    "bias-lora": QV | {"bias": "lora_only"},
    "no-zeros": QV | {"init_lora_weights": False},
}
IN_ALL = ("all-linear", "embeddings-beside-others", "embeddings-saved", "norm-saved", "parameters", "dora")
UNTIED_ALONE = {
    "tokens": QV | {"trainable_token_indices": [3, 4, 5]},
    "tying-in-vain": EMBEDDINGS | {"ensure_weight_tying": True},
    "parameters-of-embeddings": {"target_modules": [], "target_parameters": ["embed_tokens.weight"]},
}
EXPERTS = {"experts": QV | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}}
WITH_BIASES = {"lora-bias": {"target_modules": ["q_proj"], "lora_bias": True}}  # which Qwen2's queries have
QUICK = [("qwen2-tied", "embeddings-beside-others"), ("gpt2-tied", "embeddings-by-regex"), ("qwen2", "tokens")]


def cases():
    """(model, name of a setting): the quick ones first; some models have all, others what may be different in them."""
    whole = ("qwen2-tied", "qwen2", "gpt2-tied")
    found = [(model, name) for model in whole for name in TRAINED | WITH_BIASES]
    found += [(model, name) for model in ("qwen2", "mixtral") for name in UNTIED_ALONE]
    found += [(model, name) for model in MODELS if model not in whole for name in IN_ALL] + [("mixtral", "experts")]
    return QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in found if case not in QUICK]


def adapter_of(model, name):
    """A setting's arguments, in the names of a model's modules."""
    text = json.dumps({"r": 4, "lora_alpha": 16} | (TRAINED | UNTIED_ALONE | EXPERTS | WITH_BIASES)[name])
    for own, other in TO_GPT2.items() if model.startswith("gpt2") else ():
        text = text.replace(own, other)
    return json.loads(text)


@pytest.fixture
def make_base(tokenizer, tmp_path):
    """The folder of a random model with the tokenizer, made once."""

    def make(model):
        folder = tmp_path / model
        if not folder.exists():
            torch.manual_seed(0)
            sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1}
            if model.startswith("gpt2"):
                sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": None}
            else:
                sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "bos_token_id": None}
                sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[model], **sizes)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@torch.no_grad()
def logprobs(model):
    return torch.log_softmax(model.eval()(IDS).logits.double(), dim=-1)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


class FirstUpdate(Callback):
    """The largest log-ratio of a run's first update."""

    log_ratio = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.log_ratio is None:
            metrics = trainer.callback_metrics.items()
            self.log_ratio = max(abs(value) for name, value in metrics if name.startswith("log_ratio/"))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


@pytest.mark.parametrize(("model", "setting"), cases())
def test_what_was_trained_is_what_is_loaded_from_every_export(make_module, fit, make_base, tmp_path, model, setting):
    base, lora = make_base(model), adapter_of(model, setting)
    settings = {"policy": str(base), "lora": lora, "optimizer": sgd}
    first = FirstUpdate()
    module = make_module(**settings)
    fit(module, max_steps=2, callbacks=[first]).save_checkpoint(tmp_path / "a.ckpt")
    trained = logprobs(module.policy)
    budget = logprob_budget(trained)
    assert first.log_ratio <= 4 * budget  # of as many tokens
    assert (trained - logprobs(load(base))).abs().max() > 1e-4

    module.export(tmp_path / "adapter")
    module.export(tmp_path / "merged", merge_adapter=True)
    export(make_module(**settings), tmp_path / "a.ckpt", tmp_path / "from-checkpoint")
    export(make_module(**settings), tmp_path / "a.ckpt", tmp_path / "merged-from-checkpoint", merge_adapter=True)
    for name in ("adapter", "from-checkpoint"):
        assert torch.equal(logprobs(peft.PeftModel.from_pretrained(load(base), tmp_path / name)), trained)
    for name in ("merged", "merged-from-checkpoint"):
        assert_within(logprobs(load(tmp_path / name)), trained, budget, name)
    if (model, setting) in QUICK[1:]:
        return
    going_on = FirstUpdate()
    further = make_module(policy=str(tmp_path / "adapter"), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit(further, max_steps=1, callbacks=[going_on])
    further.export(tmp_path / "further", merge_adapter=True)
    assert going_on.log_ratio <= 4 * budget
    assert_within(logprobs(load(tmp_path / "further")), trained, budget, "further")
    resumed, through = make_module(**settings), make_module(**settings)
    fit(resumed, max_steps=3, ckpt_path=tmp_path / "a.ckpt")
    fit(through, max_steps=3)
    assert torch.equal(logprobs(resumed.policy), logprobs(through.policy))


def test_a_checkpoint_of_other_tokens_is_refused(make_module, fit, make_base, tmp_path):
    settings = {"policy": str(make_base("qwen2")), "lora": QV | {"trainable_token_indices": [3, 4]}}
    fit(make_module(**settings), max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    other = settings | {"lora": QV | {"trainable_token_indices": [3, 5]}}
    with pytest.raises(ValueError, match=r"trained with trainable_token_indices=\[3, 4\], the policy's has .*\[3, 5\]"):
        fit(make_module(**other), ckpt_path=tmp_path / "a.ckpt")


HEAD = r"would adapt the head \(lm_head"
REFUSED = {
    "head": (
        {"target_modules": ["q_proj", "lm_head"]},
        rf"target_modules=\['lm_head', 'q_proj'\] {HEAD}\).*leave lm_head out",
    ),
    "head-saved": (QV | {"modules_to_save": ["lm_head"]}, rf"modules_to_save=\['lm_head'\] {HEAD}"),
    "tokens-of-the-head": (
        QV | {"trainable_token_indices": {"lm_head": [3]}},
        r"trainable_token_indices={'lm_head': \[3\]}",
    ),
    "head-parameters": (
        {"target_modules": [], "target_parameters": ["lm_head.weight"]},
        rf"target_parameters=.* {HEAD}",
    ),
    "replication": (QV | {"layer_replication": [[0, 2], [0, 2]]}, r"layer_replication=.* can't be sampled from"),
    "alora": (QV | {"alora_invocation_tokens": [3]}, r"alora_invocation_tokens=\[3\] makes log-probs of tokens depend"),
    "monteclora": (QV | {"monteclora_config": {}}, r"monteclora_config=.* log-ratios are noise"),
    "kasa": (QV | {"kasa_config": {}}, r"kasa_config={} would change the model beneath"),
    "arrow": (QV | {"arrow_config": {}}, r"arrow_config={} routes between adapters"),
    "inference": (QV | {"inference_mode": True}, r"inference_mode=True leaves nothing to train"),
    "task": (QV | {"task_type": "SEQ_CLS"}, r"task_type must be CAUSAL_LM, got 'SEQ_CLS'"),
    "alpha": (QV | {"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern must be > 0, got {'q_proj': 0}"),
    "lora-bias": (
        {"target_modules": ["o_proj"], "lora_bias": True},
        r"lora_bias=True needs layers with a bias.*o_proj has",
    ),
    "norm": ({"target_modules": ["norm"]}, "={.* does not fit Qwen2ForCausalLM: Target module"),
}
REFUSED_WHERE_TIED = {
    "tokens": (
        QV | {"trainable_token_indices": [3, 4]},
        rf"trainable_token_indices=\[3, 4\] {HEAD}, tied to embed_tokens\).*",
    ),
    "tied-adapter": (EMBEDDINGS | {"ensure_weight_tying": True}, rf"ensure_weight_tying=True {HEAD}\).*leave it out"),
    "tied-copy": (QV | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying=True"),
    "tied-tokens": (QV | {"trainable_token_indices": [3], "ensure_weight_tying": True}, "ensure_weight_tying=True"),
    "parameters": (
        UNTIED_ALONE["parameters-of-embeddings"],
        rf"target_parameters=\['embed_tokens.weight'\] {HEAD}, tied",
    ),
}


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        *(pytest.param("qwen2", *case, id=f"{name}-untied") for name, case in REFUSED.items()),
        *(
            pytest.param("qwen2-tied", *case, id=f"{name}-tied")
            for name, case in (REFUSED | REFUSED_WHERE_TIED).items()
        ),
    ],
)
def test_a_setting_that_can_not_be_trained_or_exported_is_refused_by_its_name(make_base, model, lora, message):
    with pytest.raises(ValueError, match=rf"^model\.lora.*{message}") as raised:
        PolicySource(str(make_base(model)), lora=lora)
    assert "\n" not in str(raised.value)


# -- adapters that the policy brings along


@pytest.fixture
def adapted(make_base):
    """Builds the tied model with an adapter on it, as users do; arguments of peft's function and of its LoraConfig."""

    def build(config=None, adapter_name="default", **lora):
        config = config or peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | lora))
        return peft.get_peft_model(load(make_base("qwen2-tied")), config, adapter_name=adapter_name)

    return build


OBJECTS = {
    "embeddings": {"target_modules": ["embed_tokens"]},
    "named": {"adapter_name": "mine", "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]},
    "without-task": {"task_type": None, "bias": "all", "lora_dropout": 0.1},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("given", OBJECTS.values(), ids=OBJECTS)
def test_a_peft_model_that_was_given_is_exported_as_it_was_trained(
    make_module, fit, make_base, adapted, tmp_path, given
):
    base = make_base("qwen2-tied")
    module = make_module(policy=adapted(**given), optimizer=sgd)
    fit(module, max_steps=2)
    trained = logprobs(module.policy)
    module.export(tmp_path / "adapter")
    module.export(tmp_path / "merged", merge_adapter=True)
    assert torch.equal(logprobs(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")), trained)
    assert_within(logprobs(load(tmp_path / "merged")), trained, logprob_budget(trained))
    assert torch.equal(logprobs(module.policy), trained)  # the policy is what it was
    assert (trained - logprobs(load(base))).abs().max() > 1e-3


def unfrozen(adapted):
    policy = adapted()
    policy.get_base_model().model.norm.requires_grad_(True)
    return policy


def mixed(adapted):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    return peft.get_peft_model(adapted().unload(), config, mixed=True)


def prompt_tuning(adapted):
    return adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def invoked(adapted):
    return adapted(alora_invocation_tokens=[3])


def tokens(adapted):
    return adapted(trainable_token_indices=[3])


UNFIT = {
    unfrozen: r"The policy trains 'base_model\.model\.model\.norm\.weight' beside its adapter.*modules_to_save",
    mixed: "PeftMixedModel, which peft can't save",
    prompt_tuning: "The policy's adapter is PROMPT_TUNING, which puts tokens in front",
    invoked: r"The policy's adapter has alora_invocation_tokens=\[3\], which makes log-probs",
    tokens: rf"The policy's adapter has trainable_token_indices=\[3\], which {HEAD}, tied to embed_tokens\)",
}


@pytest.mark.parametrize("build", UNFIT)
def test_an_adapter_that_can_not_be_trained_or_exported_is_refused(make_module, adapted, build):
    with pytest.raises(ValueError, match=UNFIT[build]):
        make_module(policy=build(adapted))


def test_an_adapters_folder_is_held_to_the_same_before_its_model_is_loaded(make_module, adapted, make_base, tmp_path):
    tokens(adapted).save_pretrained(tmp_path / "adapter")
    (make_base("qwen2-tied") / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=rf"The adapter in '.*adapter' has trainable_token_indices=\[3\], which {HEAD}"
    ):
        make_module(policy=str(tmp_path / "adapter"))


def test_a_policy_without_anything_to_train_is_refused_by_fit_alone(make_module, fit, make_base, adapted, tmp_path):
    adapted(target_modules=["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    policy = peft.PeftModel.from_pretrained(load(make_base("qwen2-tied")), tmp_path / "adapter")
    module = make_module(policy=policy)
    with pytest.raises(ValueError, match=r"no trainable parameters.*is_trainable=True"):
        fit(module)
    module.export(tmp_path / "merged", merge_adapter=True)
    assert_within(logprobs(load(tmp_path / "merged")), logprobs(policy), logprob_budget(logprobs(policy)))


def test_biases_that_are_trained_leave_no_adapter_to_switch_off(make_module, fit, make_base):
    settings = {"policy": str(make_base("qwen2-tied")), "lora": QV | {"bias": "all"}}
    with pytest.raises(
        ValueError, match=r"adapter_off needs a model that is not trained.*bias='all'.*reference: frozen"
    ):
        fit(make_module(reference="adapter_off", **settings))


# -- what was written is read back


def with_other_positions(model):
    """The model with rotary frequencies that no file of it holds."""
    model.get_decoder().rotary_emb.inv_freq.mul_(5.0)
    return model


@pytest.mark.parametrize("merge_adapter", [False, True])
def test_an_export_that_is_not_the_policy_is_an_error_and_leaves_nothing(
    make_module, make_base, adapted, tmp_path, merge_adapter
):
    policy = adapted() if merge_adapter else load(make_base("qwen2-tied"))
    module = make_module(policy=policy)
    module.configure_model()
    module.export(tmp_path / "earlier", merge_adapter=merge_adapter)
    (tmp_path / "earlier" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()}
    with_other_positions(policy.get_base_model() if merge_adapter else policy)
    for folder in ("earlier", "new"):
        with pytest.raises(
            ValueError, match=r"is not the policy that was trained: .* differ by [\d.]+ nats a token on 28"
        ):
            module.export(tmp_path / folder, merge_adapter=merge_adapter)
    assert not (tmp_path / "new").exists()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()}


def test_of_an_earlier_export_nothing_is_left_that_would_be_loaded(make_module, make_base, adapted, tmp_path):
    module = make_module(policy=adapted(init_lora_weights=False))
    module.configure_model()
    module.export(tmp_path / "out")
    module.export(tmp_path / "out", merge_adapter=True)
    expected = logprobs(module.policy)
    assert_within(logprobs(load(tmp_path / "out")), expected, logprob_budget(expected))
    assert not list((tmp_path / "out").glob("adapter*"))


def test_what_is_missing_or_changed_in_an_adapters_files_is_named(adapted, tmp_path):
    model = adapted(init_lora_weights=False, bias="lora_only")
    write_adapter(model, model.state_dict(), tmp_path)
    check_adapter_written(tmp_path, model, model.state_dict())
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key, bias = (next(key for key in sorted(whole) if part in key) for part in ("lora_B", "bias"))
    save_file(whole | {key: whole[key] + 1}, file)
    with pytest.raises(ValueError, match=r"lora_B\.default\.weight' is not what it was"):
        check_adapter_written(tmp_path, model, model.state_dict())
    save_file({name: tensor for name, tensor in whole.items() if name != bias}, file)
    with pytest.raises(ValueError, match=r"base_layer\.bias' is missing"):
        check_adapter_written(tmp_path, model, model.state_dict())
    save_file(whole, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(ValueError, match="has lora_alpha=99, and was trained with 8"):
        check_adapter_written(tmp_path, model, model.state_dict())
