"""What a model does to its logits after the head: measured once, then part of the fused head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitMap:
    """What a model does to what its head gives: logit = softcap * tanh(scale * raw / softcap), or scale * raw."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits of raw ones."""
        scaled = raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def head_options(self, temperature: float) -> dict[str, float | None]:
        """The temperature and cap of raw logits, as the kernels take them, at which the model has `temperature`."""
        return {
            "temperature": temperature / self.scale,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
        }


def _model_output(model: PreTrainedModel, inputs: dict[str, Tensor], answer: Callable[[Tensor], Tensor]) -> Tensor:
    """What the model makes of what its head gives instead of logits."""
    head: Any = model.get_output_embeddings()
    head.head_request = answer
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        head.head_request = None


@torch.no_grad()
def find_logit_map(model: PreTrainedModel) -> LogitMap:
    """What the model does to its logits after the head, from what it makes of known numbers; one token is run.

    Raises:
        ValueError: it does more than to scale them and to cap them softly.
    """
    small, large = 2.0**-24, 2.0**60
    raw = torch.tensor([small, large, 0.0, *(sign * x for x in (0.5, 2, 8, 32, 128, 512) for sign in (1, -1))])
    raw = raw.to(torch.float32 if model.device.type == "mps" else torch.float64)
    inputs = {
        name: torch.zeros((1, 1), dtype=torch.int64, device=model.device) for name in ("input_ids", "position_ids")
    }
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled for one token
        logits = _model_output(model, inputs, lambda hidden: raw.to(hidden.device)[None, None].clone())
    logits = logits.flatten().to(raw)
    scale, limit = float(logits[0]) / small, float(logits[1])
    # a cap holds `large` back, far below scale * large
    found = LogitMap(scale, None if abs(limit) > 0.5 * abs(scale) * large else limit)
    if not (scale > 0 and limit > 0 and torch.allclose(found(raw), logits, rtol=1e-5, atol=1e-5)):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head in a way that is not supported, neither a "
            f"scale nor a soft cap: of {raw[2:].tolist()} it makes {logits[2:].tolist()}."
        )
    return found
