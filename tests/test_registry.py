import dataclasses
import functools

import pytest

from effjax import models, objectives, registry
from effjax.depth import Plain
from effjax.ffn import Dense, Gated
from effjax.mixers import Attention
from effjax.models import DecoderLM


def test_describe_and_build_are_inverse():
    for kind, part in (
        ("mixer", Attention(num_heads=8, window=5)),
        ("ffn", Dense(hidden_dim=3, activation="relu")),
        ("depth", Plain()),
    ):
        assert registry.build(kind, registry.describe(part)) == part


def test_every_registered_part_round_trips_with_its_defaults():
    for kind in ("mixer", "ffn", "depth", "head", "norm"):
        for name in registry.names(kind):
            if dataclasses.MISSING in registry.fields(registry.lookup(kind, name)).values():
                continue  # has no defaults to build it from
            part = registry.build(kind, name)
            assert registry.build(kind, registry.describe(part)) == part


def test_functions_become_partials_with_their_fields_bound():
    objective = registry.build("objective", {"name": "next_token", "z_loss": 1e-3})
    assert isinstance(objective, functools.partial)
    assert objective.func is objectives.next_token
    assert registry.describe(objective) == {"name": "next_token", "z_loss": 1e-3}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "gatd"}, "unknown ffn 'gatd'; did you mean 'gated'?"),
        ({"name": "gated", "hiden_dim": 3}, "did you mean 'hidden_dim'?"),
        ({"name": "gated", "hidden_dim": "wide"}, "field 'hidden_dim' is 'wide' .str.; valid: int"),
        ({"name": "gated", "hidden_dim": True}, "a bool"),
        ({"hidden_dim": 3}, "has no 'name'"),
    ],
)
def test_bad_specs_say_what_is_valid(spec, message):
    with pytest.raises(registry.RegistryError, match=message.replace("?", r"\?")):
        registry.build("ffn", spec)


def test_unknown_kind_and_missing_fields():
    with pytest.raises(registry.RegistryError, match=r"unknown kind of part 'fnn'.*'ffn'"):
        registry.names("fnn")
    with pytest.raises(registry.RegistryError, match=r"missing field.*'path'"):
        registry.build("tokenizer", "huggingface")


def test_merge_drops_the_fields_of_a_replaced_part():
    spec = {"ffn": {"name": "gated", "hidden_dim": 3}, "d_model": 4}
    assert registry.merge(spec, {"ffn": "dense"}) == {"ffn": {"name": "dense"}, "d_model": 4}
    assert registry.merge(spec, {"ffn": {"name": "dense", "activation": "relu"}})["ffn"] == {
        "name": "dense",
        "activation": "relu",
    }
    assert registry.merge(spec, {"ffn.hidden_dim": 5})["ffn"] == {"name": "gated", "hidden_dim": 5}
    assert spec["ffn"]["hidden_dim"] == 3


def test_registering_a_name_twice_is_an_error():
    with pytest.raises(registry.RegistryError, match="already registered"):

        @registry.register("ffn", "gated")
        class Other:
            pass


def test_create_takes_modules_specs_names_and_dotted_keys():
    by_module = models.create("transformer", ffn=Gated(hidden_dim=7))
    by_spec = models.create("transformer", ffn={"name": "gated", "hidden_dim": 7})
    by_key = models.create("transformer", **{"ffn.hidden_dim": 7})
    assert by_module == by_spec == by_key
    assert models.create("transformer", ffn="dense").ffn == Dense()
    assert isinstance(by_module, DecoderLM)


def test_spec_of_a_model_is_complete_and_builds_it():
    spec = models.spec("transformer", mixers=({"name": "attention", "num_heads": 2},))
    assert spec["mixers"][0]["causal"] is True
    name = spec.pop("name")
    assert models.create(name, **spec) == models.create(
        "transformer", mixers=(Attention(num_heads=2),)
    )


def test_create_names_the_nearest_model_and_field():
    with pytest.raises(registry.RegistryError, match="did you mean 'transformer'"):
        models.create("tranformer")
    with pytest.raises(registry.RegistryError, match="did you mean 'd_model'"):
        models.create("transformer", dmodel=4)
    with pytest.raises(registry.RegistryError, match="'d_model' is '4'"):
        models.create("transformer", d_model="4")


def test_the_plain_values_of_a_spec_by_dotted_path():
    spec = {"width": 1, "mixers": ({"name": "a", "taps": (2, 3)}, {"name": "b"}), "ffn": None}
    assert dict(registry.plain_fields(spec)) == {
        "width": 1,
        "mixers.0.name": "a",
        "mixers.0.taps": (2, 3),
        "mixers.1.name": "b",
        "ffn": None,
    }
