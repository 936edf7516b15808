"""Triton kernels run on the GPU where there is one and under Triton's interpreter elsewhere."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def _small_pieces(monkeypatch):
    """Budgets small enough that small problems are cut into several tiles, slices, chunks and blocks."""
    from gvpo_kernels import fused_loss, torch_head, triton_head

    monkeypatch.setattr(triton_head, "TILE_ROWS", 48)
    monkeypatch.setattr(triton_head, "TILE_BYTES", 4 * 48 * 128)
    monkeypatch.setattr(triton_head, "SLICE_BYTES", 4 * 60 * 128)
    monkeypatch.setattr(torch_head, "CHUNK_BYTES", 8 * 300 * 20)
    monkeypatch.setattr(fused_loss, "STREAM_BYTES", 4 * 300 * 40)


@pytest.fixture
def _poisoned():
    """Every uninitialised allocation is filled with not-a-number, and operations without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
