"""A reserved port is nobody else's, and free again afterwards; so are ranks."""

import os
import socket

import lightning as L
import pytest

from tests import ports
from tests.ports import candidates, is_free, lock, reserved_port


def test_a_port_is_reserved_once_and_given_back(monkeypatch):
    with reserved_port() as port:
        assert port in candidates()
        assert is_free(port)
        assert lock(port) is None
        monkeypatch.setattr(ports, "candidates", lambda: [port])
        with pytest.raises(RuntimeError, match="none of 1 ports is free"), reserved_port():
            pass
    with reserved_port() as again:
        assert again == port


def test_a_port_that_somebody_listens_at_is_not_free():
    for address in ("127.0.0.1", "0.0.0.0"):
        with reserved_port() as port, socket.create_server((address, port)):
            assert not is_free(port)


def test_no_port_is_one_that_the_kernel_gives_away():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] not in candidates()


def test_an_error_while_a_port_is_reserved_is_the_callers():
    with pytest.raises(FileNotFoundError), reserved_port():
        raise FileNotFoundError


@pytest.mark.parametrize("time", ["first", "again"])
def test_a_launcher_leaves_no_rank_to_the_next_test(time):
    """Else a run that this process starts later would take its ranks for launched, and wait for them."""
    assert "LOCAL_RANK" not in os.environ
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy="ddp", logger=False, enable_checkpointing=False)
    trainer.strategy._configure_launcher()
    trainer.strategy.launcher.launch(lambda: None)
    assert os.environ["LOCAL_RANK"] == "0"
