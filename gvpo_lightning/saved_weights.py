"""The policy's weights in a checkpoint, by their Hugging Face names, whatever strategy wrote it.

Three kinds are read, without a process group and without more in memory than what is asked for: a single file; the
folder of `ModelParallelStrategy(save_distributed_checkpoint=True)`; that of `FSDPStrategy(state_dict_type="sharded")`.
"""

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

# what FSDP1, activation checkpointing and torch.compile put into the names of parameters
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError)


def policy_name(key: str) -> str | None:
    """The name within the policy of a Lightning module's parameter or buffer; None for what is not the policy's."""
    first, *rest = [part for part in key.split(".") if part not in WRAPPERS]
    return ".".join(rest) if first == "policy" and rest else None


class SavedWeights:
    """Tensors that lie in a checkpoint.

    Attributes:
        tensors: by name, each with the shape and dtype that it was saved with; only `load` gives their values.
    """

    tensors: dict[str, Tensor]

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Some of the tensors on the CPU; the floating-point ones in `dtype`, by default as they were saved."""
        raise NotImplementedError


class FileWeights(SavedWeights):
    """Weights in a single file, which is mapped into memory and read where it is touched."""

    def __init__(self, path: Path) -> None:
        try:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UNREADABLE as error:
            raise ValueError(f"{path} is no checkpoint, or was not written whole: {error}") from error
        state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
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
        self._keys: dict[str, str] = {}
        self.tensors = {}
        for key, entry in metadata.state_dict_metadata.items():
            root, _, rest = key.partition(".")  # Lightning's two strategies call it differently
            saved_as = policy_name(rest) if root in ("state_dict", "model") else None
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
