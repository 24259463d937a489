"""A network namespace of one's own, in which nothing but loopback exists."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h
IFF_UP = 1  # linux/if.h
OWN = "/proc/thread-self/ns/net"


def namespace(process: int | str = "thread-self") -> str:
    """Which network namespace a process is in, or this thread."""
    return os.readlink(f"/proc/{process}/ns/net")


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """This thread, and every process and thread that it starts, see loopback and no other network.

    Raises:
        PermissionError: only root may do that (``CAP_SYS_ADMIN``).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(OWN) as before:
        _check(libc.unshare(CLONE_NEWNET))
        try:
            _raise_loopback()
            yield
        finally:
            _check(libc.setns(before.fileno(), CLONE_NEWNET))


def _raise_loopback() -> None:
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _check(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
