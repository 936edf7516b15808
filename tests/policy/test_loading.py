"""Loading settings: what they do to every model given by name, and which of them are refused."""

import json

import pytest
import torch

from gvpo_lightning import LoadingSettings
from gvpo_lightning.policy.loading import check_attention, is_installed, load_config
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODELING = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class MyConfig(Qwen2Config):
    model_type = "mine"


class MyModel(Qwen2ForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def folder(build_model, tmp_path):
    build_model("qwen2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def remote_code(folder):
    """A folder whose model is a class that lies beside it."""
    (folder / "mine.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_and_attention_are_those_asked_for(folder, dtype, attention):
    model = load_policy(str(folder), LoadingSettings(dtype, attention))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == attention


def test_code_that_a_model_brings_runs_only_if_it_is_trusted(remote_code):
    for load in (load_policy, load_config):
        with pytest.raises(
            ValueError, match=r"brings Python code of its own.*set model\.loading\.trust_remote_code=true"
        ):
            load(remote_code)
        assert "Mine" not in str(load)
    trusted = LoadingSettings(trust_remote_code=True)
    assert type(load_policy(remote_code, trusted)).__name__ == "MyModel"
    assert load_config(remote_code, trusted).model_type == "mine"


def test_a_revision_is_of_a_hub_id_and_must_be_there(folder):
    settings = LoadingSettings(revision="v2")
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ValueError, match=r"^loading\.revision='v2' is for a hub id, but .*model' is a folder"):
            load(str(folder), settings)
        with pytest.raises(ValueError, match=r"'nobody/nothing'"):
            load("nobody/nothing", settings)
    assert settings.elsewhere().revision is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp8"}, r"loading\.dtype must be one of \('float32', 'bfloat16', 'float16'\), got 'fp8'"),
        ({"quantization": "int2"}, r"loading\.quantization must be one of .* got 'int2'"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoadingSettings(**settings)


@pytest.mark.parametrize("name", ["fast", "sdap", "flash_attn_2"])
def test_an_unknown_attention_is_refused(name):
    with pytest.raises(ValueError, match=rf"attn_implementation must be one of .*'sdpa'.*, got '{name}'"):
        LoadingSettings(attn_implementation=name)


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", "flex_attention", "flash_attention_2", "kernels-community/flash-attn2"]
)
def test_the_attentions_that_transformers_knows_are_taken(name):
    assert LoadingSettings(attn_implementation=name).attn_implementation == name


@pytest.mark.parametrize(
    ("attention", "package", "extra"),
    [
        ("flash_attention_2", "flash-attn", r"gvpo-lightning\[flash\]"),
        ("flash_attention_3", "flash-attn-3", "install flash-attn-3"),
        ("flash_attention_4", "flash-attn-4", "install flash-attn-4"),
        ("kernels-community/flash-attn2", "kernels", "pip install kernels"),
    ],
)
def test_flash_attention_without_its_package_is_refused(attention, package, extra):
    if is_installed(package) or is_installed("kernels"):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"needs the package {package}: .*{extra}"):
        check_attention(LoadingSettings("bfloat16", attention), CUDA, "32-true")


@pytest.mark.parametrize(
    ("device", "precision", "dtype", "message"),
    [
        (CPU, "bf16-mixed", "bfloat16", "needs a GPU, got cpu"),
        (CUDA, "32-true", "float32", "takes 16-bit tensors, got loading.dtype=float32 with trainer.precision=32-true"),
        (CUDA, "bf16-mixed", "float32", None),
        (CUDA, "32-true", "bfloat16", None),
    ],
)
def test_flash_attention_needs_a_gpu_and_16_bits(monkeypatch, device, precision, dtype, message):
    monkeypatch.setattr(
        "gvpo_lightning.policy.loading.is_installed", lambda package: True
    )  # as if it were: it can't be built
    settings = LoadingSettings(dtype, "flash_attention_2")
    if message is None:
        check_attention(settings, device, precision)
        return
    with pytest.raises(ValueError, match=message):
        check_attention(settings, device, precision)
