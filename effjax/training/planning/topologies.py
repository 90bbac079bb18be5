"""The machines that are planned for, by name: their chips, which need not be here, and a mesh of all of them."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from effjax.registry import unknown
from effjax.training import sharding
from pallas_kernels import topology
from pallas_kernels.chips import CHIPS, Chip

HERE = "cpu"

# Bytes a second between a chip and the memory of its host, in each direction. TPUs: "How to Scale Your Model", part 2
# (jax-ml.github.io/scaling-book/tpus): 16 GB/s for v4, 32 GB/s for v6e, and typically 15 GB/s. H100: its data sheet,
# PCIe 5 of 128 GB/s both ways.
HOST_LINKS = {"v4": 16e9, "v5e": 15e9, "v5p": 15e9, "v6e": 32e9, "h100": 64e9}


def chip(name: str) -> Chip | None:
    """The chip of a topology; None for the CPU devices of this host, of which nothing is known.

    Raises:
      ValueError: for a kind of chip that is not known.
    """
    if name == HERE:
        return None
    kind, _, _ = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"plan.topology={name!r}: {unknown('chip', kind, CHIPS)}; valid: one of these with a shape, such as "
            f"v5p:8x8x8, v5e:16x16 or h100:2x8 (hosts x GPUs of each), a bare one for one chip, or {HERE!r} for the "
            "CPU devices of this host"
        )
    return CHIPS[kind]


def host_link(name: str) -> float | None:
    """Bytes a second to the memory of the host of a chip of a topology, and from there; None for `HERE`."""
    return HOST_LINKS.get(name.partition(":")[0])


def mesh(name: str, sizes: Mapping[str, int]) -> Mesh:
    """The mesh of a config on all chips of a topology.

    Args:
      name: "v5p:8x8x8", as `pallas_kernels.topology.mesh` takes it, or "cpu".
      sizes: the `mesh` section of a config.

    Raises:
      ValueError: for an unknown topology, or sizes that do not use all of its chips.
    """
    chip(name)
    devices = jax.devices("cpu") if name == HERE else list(topology.mesh(name).devices.flat)
    try:
        found = sharding.make_mesh(sizes, devices)
    except ValueError as error:
        raise ValueError(f"plan.topology={name!r} with config.{error}") from error
    if found.size != len(devices):
        raise ValueError(
            f"plan.topology={name!r} has {len(devices)} chips and config.mesh={dict(found.shape)} uses {found.size}; "
            f"valid: sizes whose product is {len(devices)}, or one of them -1"
        )
    return found
