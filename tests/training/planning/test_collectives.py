"""Communication: groups in every notation, bytes, mesh axes, and the links that a group has."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.training.planning import collectives
from effjax.training.planning.collectives import Network
from effjax.training.planning.hlo import Program
from pallas_kernels.chips import CHIPS

SIZE = 1024  # bytes of the operand


def mesh_of(*sizes, axes="abc", topology=None):
    """A mesh of chips that are numbers with coordinates, or of this host's devices."""
    if topology is None:
        devices = jax.devices()[: int(np.prod(sizes))]
    else:
        places = np.ndindex(*topology)
        devices = [types.SimpleNamespace(coords=p, process_index=p[0]) for p in places]
    return types.SimpleNamespace(
        devices=np.array(devices).reshape(sizes), shape=dict(zip(axes, sizes, strict=False))
    )


def one(opcode, attributes, mesh, chip=None):
    text = (
        f"ENTRY %main (x: f32[{SIZE // 4}]) -> f32[1] {{\n  %x = f32[{SIZE // 4}]{{0}} parameter(0)\n"
        f"  ROOT %y = f32[1]{{0}} {opcode}(%x), channel_id=1, {attributes}, to_apply=%add\n}}\n"
    )
    network = Network(mesh, chip)
    (found,) = filter(None, map(network.collective, Program(text).runs()))
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("b",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("a",), 2),
        ("{}", ("a", "b"), 8),
        ("[1,8]<=[8]", ("a", "b"), 8),
        ("[2,4]<=[8]", ("b",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("a",), 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("b",), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("a",), 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", ("b",), 2),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ("a",), 2),
    ],
)
def test_groups_lie_along_mesh_axes(groups, axes, size):
    found = one("all-reduce", f"replica_groups={groups}, use_global_device_ids=true", mesh_of(2, 4))
    assert (found.axes, found.group_size) == (axes, size)


@pytest.mark.parametrize(
    ("opcode", "received"),
    [
        ("all-gather", 3),
        ("all-gather-start", 3),
        ("reduce-scatter", 3 / 4),
        ("all-reduce", 3 / 2),
        ("all-to-all", 3 / 4),
    ],
)
def test_bytes_that_a_chip_receives_from_three_others(opcode, received):
    found = one(opcode, "replica_groups=[2,4]<=[8]", mesh_of(2, 4))
    assert found.num_bytes == SIZE * received


def test_a_sum_in_a_fusion_of_which_a_slice_is_used_is_a_reduce_scatter():
    text = """%part (p: f32[256]) -> f32[64] {
  %p = f32[256]{0} parameter(0)
  %i = s32[] constant(0)
  %sum = f32[256]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %mine = f32[64]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={64}
}

ENTRY %main (x: f32[256]) -> f32[64] {
  %x = f32[256]{0} parameter(0)
  ROOT %y = f32[64]{0} fusion(%x), kind=kCustom, calls=%part
}
"""
    (row,) = collectives.total(Program(text), Network(mesh_of(2, 4), None))
    assert (row["kind"], row["axes"], row["bytes"]) == ("reduce-scatter", ["b"], SIZE * 3 / 4)


def test_a_shift_along_an_axis():
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
    found = one("collective-permute", pairs, mesh_of(2, 4))
    assert (found.axes, found.num_bytes) == (("b",), SIZE)


@pytest.mark.parametrize(
    ("kind", "topology", "groups", "links"),
    [
        ("v5p", (8, 8, 8), "[1,512]<=[512]", 6),
        ("v5p", (8, 8, 8), "[64,8]<=[512]", 2),
        ("v5p", (2, 2, 1), "[1,4]<=[4]", 2),  # no rings: a link along each dimension
        ("v5e", (16, 16), "[16,16]<=[256]", 2),
        ("v5e", (4, 4), "[1,16]<=[16]", 2),
        ("v5e", (16, 16), "[64,4]<=[256]", 1),  # a part of a ring is none
    ],
)
def test_a_group_has_the_links_along_which_it_extends(kind, topology, groups, links):
    mesh = mesh_of(int(np.prod(topology)), topology=topology)
    found = one("all-gather", f"replica_groups={groups}", mesh, CHIPS[kind])
    assert found.seconds == pytest.approx(
        found.num_bytes / (links * CHIPS[kind].link_bytes_per_second)
    )


def test_gpus_of_a_host_have_a_switch_and_hosts_a_network():
    mesh, chip = mesh_of(16, topology=(2, 8)), CHIPS["h100"]
    within, across = (
        one("all-gather", f"replica_groups={groups}", mesh, chip)
        for groups in ("[2,8]<=[16]", "[8,2]<=[2,8]T(1,0)")
    )
    assert within.seconds == within.num_bytes / chip.link_bytes_per_second
    assert across.seconds == across.num_bytes / chip.host_bytes_per_second


def test_those_of_a_compiled_program_in_a_loop():
    """A sum along one axis at each of five trips, and a gather along the other."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    spec = PartitionSpec("a", "b")

    def exchange(x):
        def body(_, x):
            return jax.lax.pcast(0.5 * jax.lax.psum(x, "a"), "a", to="varying")

        x = jax.lax.fori_loop(0, 5, body, x)
        return jax.lax.all_gather(x, "b", axis=1, tiled=True)

    function = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))
    x = jax.ShapeDtypeStruct((16, 32), np.float32, sharding=NamedSharding(mesh, spec))
    program = Program(function.lower(x).compile().as_text())
    rows = {
        (row["kind"], *row["axes"]): (row["times"], row["bytes"])
        for row in collectives.total(program, Network(mesh, None))
    }
    share = 16 * 32 * 4 / 8
    assert rows["all-reduce", "a"] == (5, 5 * share)
    assert rows["all-gather", "b"] == (1, 3 * share)
