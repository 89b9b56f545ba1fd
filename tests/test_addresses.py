"""What can be listened on, and which addresses nobody else reaches."""

import pytest

from heterostep.addresses import asks_loopback, is_loopback, listen
from heterostep.errors import HeterostepError


def test_loopback_addresses():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "localhost.example", "")))


def test_hosts_that_requests_name():
    assert all(map(asks_loopback, ("localhost:7860", "127.0.0.2:7860", "127.0.0.1", "[::1]:7860", "[::1]")))
    assert not any(map(asks_loopback, ("evil.example:7860", "192.0.2.1", "[::2]:7860", "localhost.example:7860", "")))


def test_an_address_is_one_processs_alone():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(
            HeterostepError, match=f"cannot listen on 127.0.0.1, port {port} .*: give another port"
        ) as told:
            listen("127.0.0.1", port)
    assert told.value.field == "port"
    listen("127.0.0.1", port).close()


def test_another_machines_address_is_not_a_matter_of_the_port():
    with pytest.raises(HeterostepError, match="cannot listen on 192.0.2.1, .*: give another host") as told:
        listen("192.0.2.1", 0)
    assert told.value.field == "host"


def test_no_such_address():
    with pytest.raises(HeterostepError, match="^cannot resolve host no such host$") as told:
        listen("no such host", 0)
    assert told.value.field == "host"
