"""Log-probs that a file brings along: whose are they?"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.policy.prepare import load_policy
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.policy.weights import fingerprint
from gvpo_lightning.reference.base import Reference


class CachedReference(Reference):
    """Log-probs that the completions bring along; no model is held, and none can be asked.

    Args:
        model: the hub id or folder that has made them; None: the policy as it is loaded.
        source: the policy's.
        temperature: of the log-probs.
        recorded: gives what the file's rows say of them, and the file's path, once it has been read.
    """

    is_fixed = True

    def __init__(
        self,
        model: str | None,
        source: PolicySource,
        temperature: float,
        recorded: Callable[[], tuple[Sequence[dict[str, Any]], str]],
    ) -> None:
        super().__init__()
        self.model_name, self.source, self.temperature, self.recorded = model, source, temperature, recorded
        self._is_checked = False

    def identify(self, policy: Any, placement: Placement) -> None:
        """Raise ValueError where the log-probs are not those of the reference that the settings name; once."""
        if self._is_checked:
            return
        found, path = self.recorded()
        source, name = self.source, self.model_name
        if name is None:  # the policy, as it was loaded: a checkpoint's weights come later
            name, model = source.shown, policy
        else:
            model = load_policy(name, source.loading_of(name)).cpu()
        expected = cache_identity(model, name, source, self.temperature, placement.precision)
        if not found:
            raise ValueError("The file's rows don't say what made their reference_logprobs: run `gvpo reference`.")
        for identity in found:
            wrong = {key: identity.get(key) for key in expected if identity.get(key) != expected[key]}
            wrong.pop("model", None)
            if wrong:
                raise ValueError(
                    f"The reference log-probs in {path!r} were made by {identity.get('model')!r} with {wrong}, but "
                    f"this run's reference is {name!r} with { {key: expected[key] for key in wrong} }: set "
                    "reference.model or the settings back, or run `gvpo reference` again."
                )
        self._is_checked = True

    def refresh(self, policy: Any, *, rollout: int, update: int) -> None:
        """It never changes."""

    @contextmanager
    def applied(self, policy: Any) -> Iterator[Any]:
        """Refused."""
        raise ValueError("reference: cached can't score completions: all of them must bring their log-probs along.")
        yield  # a generator, as its siblings are


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the merges, the special tokens or the chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cache_identity(model: Any, name: str, source: PolicySource, temperature: float, precision: str) -> dict[str, Any]:
    """What log-probs of this model under a run's settings are made by; a new adapter does not count."""
    trains_on = source.can_be_reloaded and source.lora is None  # an adapter that lies in a folder
    weights = [p for key, p in model.named_parameters() if trains_on or "lora_" not in key]
    return {
        "model": name,
        "weights": fingerprint(weights),
        "tokenizer": tokenizer_hash(source.tokenizer),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "precision": precision,
        "temperature": float(temperature),
    }
