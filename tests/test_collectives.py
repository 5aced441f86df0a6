"""Workers of several nodes meet on the cluster's network, whatever their hosts' names lead to."""

from __future__ import annotations

import socket

import psutil
import pytest

import ray
from cranium import collectives


def test_an_address_is_found_on_its_interface() -> None:
    assert collectives.interface("127.0.0.1") == "lo"
    for name, addresses in psutil.net_if_addrs().items():
        for known in addresses:
            if known.family == socket.AF_INET:
                assert collectives.interface(known.address) == name
    assert collectives.interface("192.0.2.1") is None  # of documentation's network: nobody has it


@pytest.mark.parametrize(("named", "expected"), [(None, "lo"), ("eth7", "eth7")])
def test_who_names_a_network_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, named: str | None, expected: str
) -> None:
    monkeypatch.delenv(collectives.GLOO, raising=False)
    if named:
        monkeypatch.setenv(collectives.GLOO, named)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    collectives.choose()
    assert collectives.os.environ[collectives.GLOO] == expected
    monkeypatch.delenv(collectives.GLOO)
