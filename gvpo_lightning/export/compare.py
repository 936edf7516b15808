"""What was exported is read back and compared with the policy that was trained, before the export is called done."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file
from torch import Tensor

from gvpo_lightning.checkpointing.state import adapter_state
from gvpo_lightning.distributed.sharding import available_host_memory, base_model
from gvpo_lightning.policy.head import evaluating
from gvpo_lightning.policy.lora import import_peft, trained_names
from gvpo_lightning.policy.weights import unwrapped_name

# Of the mean difference of two models' log-probs, in units of 1 + the largest, rounding makes less: in float32, where
# up to 4e-6 was measured, and in 16 bits or TF32, up to 0.013 of dense models and more where experts are chosen anew.
FLOAT32_SHARE, COARSE_SHARE = 1e-4, 0.05
LogProbs = tuple[Tensor, bool]  # as `example_logprobs` gives them


@torch.inference_mode(False)
@torch.no_grad()
def example_logprobs(model: Any) -> LogProbs:
    """(28,) float64 log-probs in nats of fixed tokens, each behind those before it, on the CPU.

    And whether they are coarse: computed in 16 bits, or on a device that may round float32 to TF32. The model is whole,
    and is called in evaluation mode, without autocast.
    """
    num_tokens = len(model.get_output_embeddings().weight)
    ids = torch.randint(num_tokens, (4, 8), generator=torch.Generator().manual_seed(0)).to(model.device)
    with evaluating(model), _any_dtype_attention(model), torch.compiler.set_stance("force_eager"):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits.cpu().double(), dim=-1)
    dtypes = [weight.dtype for weight in model.parameters() if weight.is_floating_point()]
    is_coarse = model.device.type != "cpu" or min(dtype.itemsize for dtype in dtypes) < 4
    return logprobs.gather(-1, ids.cpu()[:, 1:, None]).flatten(), is_coarse


@contextmanager
def _any_dtype_attention(model: Any) -> Iterator[None]:
    """Inside, attention takes float32: flash attention does not, and is the policy's where the Trainer casts for it."""
    base = base_model(model)
    given = base.config.get_text_config()._attn_implementation
    if given in ("eager", "sdpa"):
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(given)


def check_model_written(folder: Path, kind: type[Any], trained: LogProbs) -> None:
    """Load a whole model and hold its log-probs against `trained`, those of the policy by `example_logprobs`.

    Where host memory has no room for it that is said, and nothing is compared.

    Args:
        folder: as transformers loads it.
        kind: the model's class.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    size, left = sum(path.stat().st_size for path in folder.glob("*.safetensors")), available_host_memory()
    if size > left:
        rank_zero_info(
            f"The exported model, {size / 1e9:.0f} GB, is not compared with the policy: {left / 1e9:.0f} GB are free."
        )
        return
    expected, was_coarse = trained
    found, is_coarse = example_logprobs(kind.from_pretrained(folder, dtype="auto"))
    error, largest = float((found - expected).abs().mean()), float(expected.abs().max())
    budget = (COARSE_SHARE if was_coarse or is_coarse else FLOAT32_SHARE) * (1 + largest)
    if not error <= budget:
        raise ValueError(
            f"The exported model is not the policy that was trained: their log-probs differ by {error:.2g} nats a "
            f"token on {len(found)} tokens, and rounding explains {budget:.2g}. It was not kept: export an adapter "
            "alone, or export from a checkpoint."
        )


def check_adapter_written(folder: Path, model: Any, trained: Mapping[str, Tensor]) -> None:
    """Compare the files of a LoRA adapter with what was trained, by the names that peft has for its config.

    To the bit, and with the settings that it is applied by: over the same model it gives the same log-probs. No more
    than the adapter is in memory, as the model is built without storage.

    Args:
        folder: as peft loads it.
        model: the peft model that was trained, or one of its shape.
        trained: its trained weights, by their names.

    Raises:
        ValueError: something is missing or another number.
    """
    peft, base, active = import_peft("An adapter's export"), base_model(model), model.active_adapter
    if model.peft_config[active].peft_type != peft.PeftType.LORA:
        return
    with torch.device("meta"):
        beneath = type(base)(copy.deepcopy(base.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft has to say of such an adapter it said when it was made
        config = peft.PeftConfig.from_pretrained(folder)
        read = peft.get_peft_model(beneath, config, adapter_name=active, low_cpu_mem_usage=True)
    names = {id(tensor): name for name, tensor in read.named_parameters()}
    keys = peft.get_peft_model_state_dict(
        read, state_dict=dict(read.named_parameters()), adapter_name=active, save_embedding_layers=False
    )
    written = load_file(folder / "adapter_model.safetensors")
    found = {names[id(tensor)]: written.get(key) for key, tensor in keys.items()}
    for name in sorted(map(unwrapped_name, trained_names(model))):
        tensor = found.get(name)
        if tensor is None or not torch.equal(tensor, trained[name].cpu()):
            raise ValueError(
                f"The exported adapter is not the one that was trained: {name!r} is "
                f"{'missing' if tensor is None else 'not what it was'}. It was not kept."
            )
    own, saved = (adapter_state(each, None)["config"] for each in (model, read))
    for key in own:
        if own[key] != saved[key]:
            raise ValueError(
                f"The exported adapter has {key}={saved[key]}, and was trained with {own[key]}. It was not kept."
            )
