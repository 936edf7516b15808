"""Ports for processes that meet at one: none that anything else on the machine can take before they do."""

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST, LAST = 10_000, 65_535


def candidates() -> list[int]:
    """The ports that the kernel gives to no outgoing connection and to nobody who asks for any free one."""
    low, high = map(int, EPHEMERAL.read_text().split()) if EPHEMERAL.exists() else (32_768, LAST)
    ports = [port for port in range(FIRST, LAST + 1) if not low <= port <= high]
    return ports or list(range(FIRST, LAST + 1))  # where the kernel's range is everything


def is_free(port: int) -> bool:
    """Whether nobody listens there, at any of the machine's addresses."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with suppress(OSError), socket.create_server(("", port), family=family, dualstack_ipv6=both):
        return True
    return False


def lock(port: int) -> int | None:
    """The descriptor of a locked file that stands for the port, None where another test or run of the suite has it.

    The lock goes with this process, however that ends.
    """
    file = None
    try:
        file = os.open(Path(tempfile.gettempdir()) / f"gvpo-test-port-{port}", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # or the file is another user's
        if file is not None:
            os.close(file)
        return None
    return file


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port for as long as the processes that use it run."""
    ports = candidates()
    random.SystemRandom().shuffle(ports)  # whatever seed a test has set
    for port in ports:
        file = lock(port)
        if file is None:
            continue
        try:
            if is_free(port):
                yield port
                return
        finally:
            os.close(file)
    raise RuntimeError(f"none of {len(ports)} ports is free")
