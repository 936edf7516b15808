"""The policy's weights in a checkpoint, by their Hugging Face names, whatever strategy wrote it.

Three kinds are read, without a process group and without more in memory than what is asked for: a single file; the
folder of `ModelParallelStrategy(save_distributed_checkpoint=True)`; that of `FSDPStrategy(state_dict_type="sharded")`.
"""

import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from gvpo_lightning.policy.weights import policy_name

UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError)


class SavedWeights(ABC):
    """Tensors that lie in a checkpoint.

    Attributes:
        path: the checkpoint.
        step: optimizer updates that the run had made.
        adapter: what `adapter_state` has left; None without an adapter.
        tensors: by name, each with the shape and dtype that it was saved with; only `load` gives their values.
    """

    path: Path
    step: int | None
    adapter: dict[str, Any] | None
    tensors: dict[str, Tensor]

    @abstractmethod
    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Some of the tensors on the CPU; the floating-point ones in `dtype`, by default as they were saved."""


class FileWeights(SavedWeights):
    """Weights in a single file, which is mapped into memory and read where it is touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UNREADABLE as error:
            raise ValueError(f"{path} is no checkpoint, or was not written whole: {error}") from error
        checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
        state = checkpoint.get("state_dict")
        self.step, self.adapter = checkpoint.get("global_step"), checkpoint.get("adapter")
        named = {policy_name(key): tensor for key, tensor in (state or {}).items()}
        self.tensors = {name: tensor for name, tensor in named.items() if name is not None}

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `SavedWeights`."""
        return {
            name: self.tensors[name].to(as_written(self.tensors[name], dtype)).contiguous().detach() for name in names
        }


class FolderWeights(SavedWeights):
    """Weights in the shards of a distributed checkpoint, of whatever number of ranks; each is put together whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in (".metadata", "meta.pt"):
            if not (path / name).is_file():
                raise ValueError(
                    f"{path} has no {name}: it is no distributed checkpoint, or its run was stopped while it was being "
                    "written. Take an earlier one."
                )
        self._reader = dcp.FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
        except UNREADABLE as error:
            raise ValueError(f"{path / '.metadata'} can't be read, take an earlier checkpoint: {error}") from error
        _check_shards(path, metadata)
        rest = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
        self.step, self.adapter = rest.get("global_step"), rest.get("adapter")
        self._keys: dict[str, str] = {}
        self.tensors = {}
        for key, entry in metadata.state_dict_metadata.items():
            root, _, name = key.partition(".")  # Lightning's two strategies call it differently
            saved_as = policy_name(name) if root in ("state_dict", "model") else None
            if saved_as is not None and isinstance(entry, TensorStorageMetadata):
                self._keys[saved_as] = key
                self.tensors[saved_as] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `SavedWeights`."""
        loaded = {}
        for name in names:
            saved = self.tensors[name]
            loaded[name] = torch.empty(saved.shape, dtype=as_written(saved, dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.load(
                {self._keys[name]: tensor for name, tensor in loaded.items()}, storage_reader=self._reader, no_dist=True
            )
        return loaded


def as_written(saved: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a saved tensor gets where floating-point ones are asked for in `dtype`."""
    return saved.dtype if dtype is None or not saved.is_floating_point() else dtype


def _check_shards(path: Path, metadata: Metadata) -> None:
    """Every shard is there and as long as the metadata say."""
    ends: dict[str, int] = {}
    for stored in (metadata.storage_data or {}).values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size < end:
            raise ValueError(
                f"{path / name} has {size} of its {end} bytes: copy the whole folder, from all nodes, or take an "
                "earlier checkpoint."
            )


def open_weights(path: str | Path) -> SavedWeights:
    """The policy's weights in a checkpoint file or folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a checkpoint of a GVPOModule, or is not whole.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path={str(path)!r} does not exist: give a checkpoint's file or folder.")
    weights: SavedWeights = FolderWeights(path) if path.is_dir() else FileWeights(path)
    if not weights.tensors:
        raise ValueError(f"{path} is not a checkpoint of a GVPOModule: it has no weights named 'policy.…'.")
    return weights


def match_names(model: nn.Module, weights: SavedWeights) -> dict[str, str]:
    """For each tensor of the model, one of those that are tied, the name that the checkpoint has it under.

    A checkpoint of an adapter may leave out what is frozen beneath it.

    Raises:
        ValueError: model and checkpoint differ in names or shapes, or tied weights have come apart.
    """
    ties: dict[int, list[str]] = {}
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        ties.setdefault(id(tensor), []).append(name)
        shapes[name] = tensor.shape
    saved = {name: tensor.shape for name, tensor in weights.tensors.items()}
    frozen = _frozen_names(model)
    missing = [names[0] for names in ties.values() if not set(names) & (saved.keys() | frozen)]
    others = sorted(saved.keys() - shapes.keys())
    differing = [name for name in saved.keys() & shapes.keys() if saved[name] != shapes[name]]
    mend = "Give the policy that this checkpoint was trained from (model.policy, model.lora)."
    if missing:
        raise ValueError(f"{weights.path} has no {missing[0]!r} ({len(missing)} are missing). {mend}")
    if others:
        raise ValueError(f"{weights.path} has {others[0]!r}, which the policy has not ({len(others)} of them). {mend}")
    if differing:
        name = min(differing)
        raise ValueError(f"{weights.path} has {name!r} as {tuple(saved[name])}, not {tuple(shapes[name])}. {mend}")
    for names in ties.values():
        present = [name for name in names if name in saved]
        copies = [weights.load([name])[name].view(torch.uint8) for name in present] if len(present) > 1 else []
        if any(not torch.equal(copies[0], other) for other in copies[1:]):
            raise ValueError(
                f"{' and '.join(present)} are one tensor in the policy, but differ in {weights.path}. {mend}"
            )
    return {names[0]: present[0] for names in ties.values() if (present := [n for n in names if n in saved])}


def _frozen_names(model: nn.Module) -> set[str]:
    """Tensors beneath an adapter that a checkpoint may leave out; none of a model without one."""
    if not hasattr(model, "peft_config"):
        return set()
    return model.state_dict().keys() - {name for name, p in model.named_parameters() if p.requires_grad}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a checkpoint's weights into the policy, which is whole; errors as in `open_weights` and `match_names`."""
    weights = open_weights(path)
    sources, own = match_names(model, weights), model.state_dict()
    for name, source in sources.items():
        own[name].copy_(weights.load([source])[source])
