"""Tables of block sizes: what is found in them, what is refused, and that the tables of the ops can be."""

import dataclasses
import functools
import importlib
import json
from pathlib import Path

import jax
import pytest
from proof import needs_libtpu

import pallas_kernels
from pallas_kernels import topology
from pallas_kernels.attention import blocks as attention_blocks
from pallas_kernels.blocks import Table, bucket, decided_by, read

ATTENTION = attention_blocks.TABLE
SHAPE = {"num_queries": 2048, "num_keys": 2048, "group": 1}
SHAPE |= {"head_dim": 64, "itemsize": 2, "window": None}
ENTRY = {"shape": SHAPE, "sizes": {"queries": 256, "keys": 1024}}
RULE = {"queries": 512, "keys": 512}


def table_of(tmp_path, entries) -> Table:
    """The table of attention with other entries for the kind "chip"."""
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps({"chip": entries}))
    return dataclasses.replace(ATTENTION, path=path)


def test_an_entry_is_for_its_device_and_its_bucket_of_lengths(tmp_path):
    table = table_of(tmp_path, [ENTRY])

    def choose(kind="chip", **changed):
        return table.choose(kind, RULE, **(SHAPE | changed))

    assert choose() == choose(num_queries=1025) == choose(num_keys=1999) == ENTRY["sizes"]
    for other in ({"num_queries": 1024}, {"num_keys": 2049}, {"head_dim": 63}, {"window": 100}):
        assert choose(**other) == RULE
    assert choose(kind="another chip") == RULE


def test_without_a_file_the_rule_holds(tmp_path):
    table = dataclasses.replace(ATTENTION, path=tmp_path / "blocks.json")
    assert table.choose("chip", RULE, **SHAPE) == RULE


def test_buckets_are_powers_of_two(rng):
    assert [bucket(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
    for length in rng.integers(1, 10**6, 20).tolist():
        assert bucket(length) // 2 < length <= bucket(length)
        assert bucket(bucket(length)) == bucket(length)


def changed(part, **values):
    return ENTRY | {part: ENTRY[part] | values}


FLAWS = {
    "unknown size": (changed("sizes", values=1), "sizes must have the keys queries, keys"),
    "unknown number": (changed("shape", time=1), "shape must have the keys num_queries, num_keys"),
    "missing": ({"shape": SHAPE}, "must be an object of shape and sizes"),
    "no divisor": (changed("sizes", keys=200), "keys=200 is no multiple of 128"),
    "too long": (changed("sizes", keys=4096), "keys=4096 is more than there are, 2048"),
    "no bucket": (changed("shape", num_keys=2000), "num_keys=2000 is no power of two"),
    "no number": (changed("sizes", keys="512"), "keys='512' is no positive integer"),
    "negative": (changed("sizes", keys=-128), "keys=-128 is no positive integer"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_an_entry_that_cannot_be_is_refused_by_name(tmp_path, flaw):
    entry, message = FLAWS[flaw]
    table = table_of(tmp_path, [ENTRY, entry])
    with pytest.raises(ValueError) as error:
        table.choose("chip", RULE, **SHAPE)
    assert str(error.value).startswith(f"{table.path}: entry {json.dumps(entry)} of 'chip': ")
    assert message in str(error.value)


def test_two_entries_of_a_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is another one of that shape"):
        read(table_of(tmp_path, [ENTRY, changed("sizes", keys=128)]))


@pytest.mark.parametrize("text", ["[]", '{"chip": {}}', "{"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    table = table_of(tmp_path, [])
    table.path.write_text(text)
    with pytest.raises(ValueError, match=str(table.path)):
        read(table)


def test_whoever_decides_sees_every_choice_and_may_leave_it():
    seen = []

    def decide(choice):
        seen.append(choice)
        return {"queries": 128, "keys": 256} if len(seen) == 1 else None

    shape = SHAPE | {"num_queries": 500}
    with decided_by(decide):
        decided, left = (attention_blocks.blocks("no such chip", **shape) for _ in range(2))
    assert decided == (128, 256)
    assert left == attention_blocks.blocks("no such chip", **shape) == (512, 512)
    assert len(seen) == 2
    assert seen[0].shape == SHAPE | {"num_queries": 512}
    assert seen[0].name.startswith("attention num_queries=512 num_keys=2048 group=1")


def shipped() -> dict[str, Table]:
    """The tables of all ops."""
    package = Path(pallas_kernels.__path__[0])
    modules = [
        importlib.import_module(f"pallas_kernels.{path.parent.name}.{path.stem}")
        for name in ("blocks", "tpu_blocks")
        for path in package.glob(f"*/{name}.py")
    ]
    return {module.TABLE.path.parent.name: module.TABLE for module in modules}


def test_every_table_that_is_shipped_can_be():
    tables = shipped()
    assert set(tables) >= {"attention", "linear_attention", "selective_scan", "softmax", "ssd_scan"}
    files = {path.parent.name for path in Path(pallas_kernels.__path__[0]).glob("*/blocks.json")}
    assert files <= set(tables)
    for op, table in tables.items():
        assert table.path.parent.name == op
        read(table)


@needs_libtpu
def test_kinds_of_devices_in_tables_are_those_of_devices():
    known = {
        topology.mesh(chip).devices.flat[0].device_kind for chip in ("v4", "v5e", "v5p", "v6e")
    }
    for table in shipped().values():
        assert {kind for kind, _ in read(table)} <= known


def test_the_sizes_of_a_table_are_those_of_the_kernel(tmp_path, monkeypatch):
    kind = jax.devices()[0].device_kind
    shape = SHAPE | {"num_queries": 512, "num_keys": 512, "head_dim": 8, "itemsize": 4}

    def program(sizes):
        table = dataclasses.replace(ATTENTION, path=tmp_path / f"{sizes['queries']}.json")
        table.path.write_text(json.dumps({kind: [{"shape": shape, "sizes": sizes}]}))
        monkeypatch.setattr(attention_blocks, "TABLE", table)
        x = jax.ShapeDtypeStruct((1, 512, 1, 8), "float32")
        attend = functools.partial(pallas_kernels.attention, implementation="tpu_interpret")
        return str(jax.make_jaxpr(attend)(x, x, x))

    logits = "f32[128,256]"
    assert logits in program({"queries": 128, "keys": 256})
    assert logits not in program({"queries": 512, "keys": 256})
