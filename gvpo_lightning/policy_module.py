"""`PolicyModule`: the part of `GVPOModule` that holds a policy: loaded, checked, saved and exported."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.checkpointing.adapter import adapter_state, check_adapter_state
from gvpo_lightning.distributed.placement import data_ranks, full_state_dict
from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.distributed.sharding import is_sharded
from gvpo_lightning.export.adapter import merged_policy, write_adapter
from gvpo_lightning.export.folder import sample_at_a_temperature, save_model, write_beside
from gvpo_lightning.export.model_card import Kind, run_config
from gvpo_lightning.policy.fingerprint import frozen_fingerprint
from gvpo_lightning.policy.loading import LoadingSettings, check_attention, empty_model, load_config
from gvpo_lightning.policy.lora import (
    add_lora,
    check_adapter,
    check_policy_settings,
    is_adapted,
    leave_frozen_out,
    saves_adapter_alone,
    trained_names,
)
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer, prepare_policy, stop_token_ids
from gvpo_lightning.seeding import derive_seed


class PolicyModule(L.LightningModule):
    """Loads a policy and its tokenizer, and writes them. Arguments as in `GVPOModule`."""

    policy: Any  # a PreTrainedModel once `configure_model` has run

    def __init__(
        self,
        policy: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None,
        loading: LoadingSettings,
        lora: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        check_policy_settings(policy, loading, lora)
        self.policy_source = policy
        self.loading, self.lora = loading, lora
        self.policy = None if isinstance(policy, str) else policy
        config = self.model_config()  # of a policy that is not there the error must not speak of its tokenizer
        if lora is not None:
            add_lora(empty_model(config, loading), lora, seed=0)  # it fits, before data and weights are loaded
        self.tokenizer = self._resolve_tokenizer(tokenizer)
        self._saved_names: frozenset[str] | None = None  # of the policy's weights, where not all are saved
        self._adapter_state: dict[str, Any] | None = None

    def _resolve_tokenizer(self, tokenizer: str | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        if tokenizer is None and not isinstance(self.policy_source, str):
            raise ValueError("A policy given as a model object needs its tokenizer: pass tokenizer=…")
        source: Any = self.policy_source if tokenizer is None else tokenizer
        return load_tokenizer(source, self.loading_of(source)) if isinstance(source, str) else source

    def loading_of(self, name: str) -> LoadingSettings:
        """How a model or tokenizer of this name is loaded."""
        return self.loading if name == self.policy_source else self.loading.elsewhere()

    @property
    def data_ranks(self) -> DataRanks:
        """The ranks that share a rollout."""
        return data_ranks(self.trainer.strategy)

    @property
    def seed(self) -> int:
        """The run's seed, as set by `lightning.seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def setup(self, stage: str) -> None:
        """Check what can be checked without the model."""
        strategy = self.trainer.strategy
        check_attention(self.loading, strategy.root_device, str(self.trainer.precision))
        if self.loading.quantization is not None and is_sharded(strategy):
            raise ValueError(
                f"loading.quantization={self.loading.quantization!r} can't be sharded, got {type(strategy).__name__}: "
                "use one device or DDP, or loading.dtype=bfloat16 without quantization."
            )
        if self.lora is not None and self.loading.dtype != "float32" and isinstance(strategy, FSDPStrategy):
            raise ValueError(
                f"FSDPStrategy can't hold a float32 adapter beside weights in loading.dtype={self.loading.dtype}: use "
                "FSDP2 (ModelParallelStrategy, configs/strategy/fsdp2.yaml), or leave loading.dtype out."
            )

    def configure_model(self) -> None:
        """Load the policy and check that its completions can end."""
        if self.policy is None:
            assert isinstance(self.policy_source, str)
            self.policy = load_policy(self.policy_source, self.loading, self.lora, derive_seed(self.seed, "lora"))
        else:
            prepare_policy(self.policy)
        self._save_trained_alone()
        if is_adapted(self.policy) and self._adapter_state is None:
            frozen = None if self._saved_names is None else frozen_fingerprint(self.policy)
            self._adapter_state = adapter_state(self.policy, frozen)
        if not stop_token_ids(self.policy, self.tokenizer):
            raise ValueError(
                "The policy has no end-of-sequence token: set generation_config.eos_token_id or tokenizer.eos_token."
            )

    def _save_trained_alone(self) -> None:
        """Leave the frozen weights beneath an adapter out of checkpoints: they are where the policy came from.

        Not with FSDP1, which flattens trained and frozen weights together.
        """
        if self._saved_names is not None or (self._trainer and isinstance(self.trainer.strategy, FSDPStrategy)):
            return
        if saves_adapter_alone(self.policy, can_be_reloaded=isinstance(self.policy_source, str)):
            self._saved_names = trained_names(self.policy)
            self.strict_loading = False
            self.register_state_dict_post_hook(functools.partial(leave_frozen_out, self._saved_names))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what identifies an adapter and the model beneath it."""
        if self._adapter_state is not None:
            checkpoint["adapter"] = self._adapter_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError where an adapter, or the model beneath it, is not the one that is trained here."""
        if self._saved_names is not None and "state_dict" in checkpoint:  # else of a folder, which its reader checks
            check_adapter(self.policy, self._saved_names, checkpoint["state_dict"])
        if self.policy is not None:
            check_adapter_state(self._adapter_state, checkpoint.get("adapter"))

    def model_config(self) -> PretrainedConfig:
        """The policy's, also before it is loaded."""
        source = self.policy_source if self.policy is None else self.policy
        return load_config(source, self.loading) if isinstance(source, str) else source.config

    def vocab_size(self) -> int:
        """Token ids that the policy has."""
        return self.model_config().get_text_config().vocab_size

    def export(
        self, folder: str | Path, *, merge_adapter: bool = False, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Write the policy as a Hugging Face folder with a model card; every rank must call this.

        Args:
            merge_adapter: of a policy with an adapter, the whole model with the adapter merged in, not it alone.
            summary: the run's results, for the model card.

        Raises:
            ValueError: there is no adapter to merge, or it can't be done with this policy.
        """
        state = None if self._trainer is None else full_state_dict(self)
        if self.global_rank:
            return
        kind: Kind = "merged" if merge_adapter else "adapter" if is_adapted(self.policy) else "model"
        Path(folder).mkdir(parents=True, exist_ok=True)
        sample_at_a_temperature(self.policy.generation_config)
        if merge_adapter:
            save_model(merged_policy(self, state), Path(folder))
        elif is_adapted(self.policy):
            write_adapter(self.policy, dict(self.policy.named_parameters()) if state is None else state, Path(folder))
        else:
            self.policy.save_pretrained(folder, state_dict=state)
        write_beside(self, self.policy.generation_config, Path(folder), kind, run_config(self._trainer), summary)
