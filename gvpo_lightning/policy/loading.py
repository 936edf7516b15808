"""How models, configs and tokenizers are loaded by name: one set of settings for all of them."""

import copy
import json
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import find_adapter_config_file

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]
UNLOADABLE = (OSError, ValueError, ImportError)

# what pip calls what an attention needs; with `kernels` transformers takes a build of it from the hub instead
FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


@dataclass(frozen=True)
class LoadingSettings:
    """How a policy given by name is loaded, and every other model of the run beside it.

    Attributes:
        dtype: of the weights in memory, whatever the file's; mixed precision is the Trainer's (`trainer.precision`).
        attn_implementation: "eager", "sdpa", "flash_attention_2" (and 3, 4), "flex_attention", or a kernel on the hub
            such as "kernels-community/flash-attn2"; None = transformers' own choice, sdpa where it can.
        trust_remote_code: run the Python code that a model's folder or hub id brings along.
        revision: branch, tag or commit of the policy's hub id; models of other names have their newest.
        quantization: "nf4" (4 bits, QLoRA) or "int8", by bitsandbytes, of the layers' matrices; needs `lora`.
    """

    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("dtype", self.dtype, get_args(Dtype)),
            ("quantization", self.quantization, (None, *get_args(Quantization))),
        ):
            if value not in allowed:
                raise ValueError(f"loading.{name} must be one of {allowed}, got {value!r}.")
        known = sorted({"eager", *FLASH_PACKAGES, *ALL_ATTENTION_FUNCTIONS})
        if self.attn_implementation not in (None, *known) and "/" not in str(self.attn_implementation):
            raise ValueError(
                f"loading.attn_implementation must be one of {known}, or a kernel on the hub such as "
                f"'kernels-community/flash-attn2', got {self.attn_implementation!r}."
            )
        if self.quantization is not None and not is_installed("bitsandbytes"):
            raise ValueError(
                f"loading.quantization={self.quantization!r} needs bitsandbytes: pip install "
                "'gvpo-lightning[quantization]'."
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights that are not quantized."""
        return getattr(torch, self.dtype)

    @property
    def uses_flash(self) -> bool:
        """Whether the attention takes 16-bit tensors on a GPU alone."""
        return "flash" in (self.attn_implementation or "")

    def elsewhere(self) -> "LoadingSettings":
        """For another name than the policy's: a revision is of one hub id."""
        return replace(self, revision=None)

    def whole(self) -> "LoadingSettings":
        """To write weights from: not quantized, and then in 16 bits."""
        if self.quantization is None:
            return replace(self, attn_implementation=None)
        dtype: Dtype = "bfloat16" if self.dtype == "float32" else self.dtype
        return replace(self, attn_implementation=None, quantization=None, dtype=dtype)


def is_installed(package: str) -> bool:
    """Whether pip has installed a package of this name."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def check_attention(loading: LoadingSettings, device: torch.device, precision: str) -> None:
    """Raise ValueError for an attention that can't run on this device, in this precision or without its package."""
    name = loading.attn_implementation
    if not loading.uses_flash:
        return
    package = FLASH_PACKAGES.get(name or "", "kernels")
    if not is_installed(package) and not is_installed("kernels"):
        mend = {"flash-attn": "pip install 'gvpo-lightning[flash]', or ", "kernels": ""}
        how = mend.get(package, f"install {package}, or ")
        raise ValueError(
            f"loading.attn_implementation={name!r} needs the package {package}: {how}pip install kernels, with which "
            "transformers takes a build from the hub (kernels-community); or leave the setting out."
        )
    if device.type != "cuda":
        raise ValueError(f"loading.attn_implementation={name!r} needs a GPU, got {device.type}: leave it out.")
    if loading.dtype == "float32" and not precision.startswith(("bf16", "16")):
        raise ValueError(
            f"loading.attn_implementation={name!r} takes 16-bit tensors, got loading.dtype=float32 with "
            f"trainer.precision={precision}: set trainer.precision=bf16-mixed or loading.dtype=bfloat16."
        )


def adapter_base(name: str, loading: LoadingSettings) -> tuple[str, LoadingSettings] | None:
    """Of a folder or hub id that holds an adapter, the model beneath and how to load it; else None."""
    try:
        path = find_adapter_config_file(name, revision=loading.revision)
    except OSError:  # nothing is there: what loads the model says so
        path = None
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    return config["base_model_name_or_path"], replace(loading, revision=config.get("revision"))


def load_config(name: str, loading: LoadingSettings = LoadingSettings(), setting: str = "policy") -> PretrainedConfig:
    """A model's config; of an adapter's folder, that of the model beneath. Errors call it by the `setting`.

    Raises:
        ValueError: there is none.
    """
    base = adapter_base(name, loading)
    if base is not None:
        return load_config(*base, setting)
    arguments = hub_arguments(name, loading)
    try:
        return AutoConfig.from_pretrained(name, **arguments)
    except UNLOADABLE as error:
        raise not_loaded(setting, name, loading, error) from error


def load_base_model(name: str, loading: LoadingSettings) -> PreTrainedModel:
    """A causal LM from a hub id or a folder, as transformers builds it.

    Raises:
        ValueError: nothing that transformers can load in this way is there.
    """
    arguments: dict[str, Any] = hub_arguments(name, loading)
    if loading.attn_implementation is not None:
        arguments["attn_implementation"] = loading.attn_implementation
    if loading.quantization is not None:
        arguments["quantization_config"] = _quantization_config(loading)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=loading.torch_dtype, **arguments)
    except UNLOADABLE as error:
        raise not_loaded("policy", name, loading, error) from error
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # or bitsandbytes packs the weights when they are first sampled from on a CPU, and training fails on them
            layer.support_avx512bf16_for_cpu = False
    return model


def load_generation_config(name: str, loading: LoadingSettings) -> GenerationConfig | None:
    """The generation config of a hub id or a folder, None where there is none."""
    arguments = hub_arguments(name, loading)
    del arguments["trust_remote_code"]  # which it does not know
    try:
        return GenerationConfig.from_pretrained(name, **arguments)
    except OSError:
        return None


def empty_model(config: PretrainedConfig, loading: LoadingSettings = LoadingSettings()) -> PreTrainedModel:
    """The causal LM that a config describes, without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=loading.trust_remote_code)


def is_quantized(model: Any) -> bool:
    """Whether layers of the model hold quantized weights."""
    return getattr(model, "quantization_method", None) is not None


def hub_arguments(name: str, loading: LoadingSettings) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes of the settings, whatever is loaded."""
    if loading.revision is not None and Path(name).is_dir():
        raise ValueError(
            f"loading.revision={loading.revision!r} is for a hub id, but {name!r} is a folder: leave it out, or give "
            "the folder of that revision."
        )
    return {"trust_remote_code": loading.trust_remote_code, "revision": loading.revision or "main"}


def _quantization_config(loading: LoadingSettings) -> BitsAndBytesConfig:
    if loading.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=loading.torch_dtype,
        bnb_4bit_use_double_quant=True,  # the scales too are quantized, as in QLoRA
    )


def not_loaded(setting: str, name: str, loading: LoadingSettings, error: Exception) -> ValueError:
    """What to tell the user of an error in loading."""
    reason = str(error)
    if "trust_remote_code" in reason:
        return ValueError(
            f"{setting}={name!r} brings Python code of its own: read it, and set model.loading.trust_remote_code=true "
            "to run it."
        )
    if loading.revision is not None and "revision" in reason:
        return ValueError(f"{setting}={name!r} has no loading.revision={loading.revision!r}: {reason}")
    if setting == "tokenizer":
        return ValueError(f"tokenizer={name!r} has no tokenizer that transformers loads, set model.tokenizer: {reason}")
    return ValueError(f"{setting}={name!r} is neither a folder with a model nor a hub id, or can't be loaded: {reason}")
