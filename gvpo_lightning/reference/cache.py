"""Log-probs that a file brings along: whose are they?"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from gvpo_lightning.policy.fingerprint import fingerprint
from gvpo_lightning.policy.prepare import load_policy
from gvpo_lightning.reference.base import Reference

if TYPE_CHECKING:
    from gvpo_lightning.module import GVPOModule


class CachedReference(Reference):
    """Log-probs that the completions bring along; no model is held, and none can be asked."""

    is_fixed = True
    is_checked = False  # that the log-probs are those of the model that the settings name

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


def cache_identity(module: "GVPOModule", trainer: Trainer, model: Any, name: str) -> dict[str, Any]:
    """What log-probs of this model under the module's settings are made by; a new adapter does not count."""
    trains_on = isinstance(module.policy_source, str) and module.lora is None  # an adapter that lies in a folder
    weights = [p for key, p in model.named_parameters() if trains_on or "lora_" not in key]
    return {
        "model": name,
        "weights": fingerprint(weights),
        "tokenizer": tokenizer_hash(module.tokenizer),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "precision": str(trainer.precision),
        "temperature": float(module.temperature),
    }


def check_cache(module: "GVPOModule") -> None:
    """Raise ValueError where the file's log-probs are not those of the reference that the settings name."""
    source = module.reference_settings.model
    if source is None:  # the policy, as it was loaded: a checkpoint's weights come later
        source = module.policy_source if isinstance(module.policy_source, str) else type(module.policy).__name__
        expected = cache_identity(module, module.trainer, module.policy, source)
    else:
        expected = cache_identity(module, module.trainer, load_policy(source, module.loading_of(source)).cpu(), source)
    found = module.sources.references
    if not found:
        raise ValueError("The file's rows don't say what made their reference_logprobs: run `gvpo reference`.")
    for identity in found:
        wrong = {key: identity.get(key) for key in expected if key != "model" and identity.get(key) != expected[key]}
        if wrong:
            assert module.sources.settings.file is not None
            raise ValueError(
                f"The reference log-probs in {module.sources.settings.file.path!r} were made by "
                f"{identity.get('model')!r} with {wrong}, but this run's reference is {source!r} with "
                f"{ {key: expected[key] for key in wrong} }: set reference.model or the settings back, or run "
                "`gvpo reference` again."
            )
