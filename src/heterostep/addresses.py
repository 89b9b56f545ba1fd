"""Addresses that the page and the service listen on."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket

from heterostep.errors import HeterostepError


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, that no other one reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def asks_loopback(header: str) -> bool:
    """Whether a request's Host header, such as 127.0.0.1:7860, names this machine's own address."""
    return is_loopback(re.sub(r":\d*$", "", header))


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; port 0 takes a free one.

    Raises:
        HeterostepError: the address is not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise HeterostepError(f"cannot resolve host {host}", "host") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        why = error.strerror or "address unavailable"
        other = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise HeterostepError(f"cannot listen on {host}, port {port} ({why}): give another {other}", other) from error
    return sock
