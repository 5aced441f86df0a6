"""How the workers of a training reach each other: by the address that Ray knows their node by.

Gloo listens where the host's own name leads to, and on many machines that is their loopback (Debian writes it into
/etc/hosts): workers of other nodes would call at their own door. NCCL looks for a network itself.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

import ray

GLOO = "GLOO_SOCKET_IFNAME"


class Torch(TorchConfig):  # type: ignore[misc]  # Ray's is untyped
    """Ray's process group, of Gloo on the network of the cluster unless a node's environment names another."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnTheClustersNetwork


class _OnTheClustersNetwork(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose)
        super().on_start(worker_group, backend_config)


def choose() -> None:
    """Name the network in this process's environment, unless one is named or none has the node's address."""
    found = interface(ray.util.get_node_ip_address())
    if found and GLOO not in os.environ:
        os.environ[GLOO] = found


def interface(address: str) -> str | None:
    """The network interface of this host that has an IP address."""
    every = psutil.net_if_addrs().items()
    return next((str(name) for name, known in every if address in (one.address for one in known)), None)
