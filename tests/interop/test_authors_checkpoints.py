"""What is particular to checkpoints of the authors' own code; that they give equal outputs is in test_families."""

import jax
import numpy as np
import pytest
from hf_folders import RECORDED, assert_same_tensors, config, tensors, variant

from effjax.depth import MixtureOfRecursions, Recursive
from effjax.interop import InteropError, load_hf, save_hf
from effjax.interop.architecture import spelled_out
from effjax.mixers import ShortConv, SlidingWindow, TaylorLinear

ATTENTION = "model.layers.1.block.1.self_attn.q_proj.weight"


def same(one, other):
    """Whether two pairs of a model and its variables are the same."""
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    return one[0] == other[0]


def test_based_is_the_model_of_the_zoo():
    model, _ = load_hf(RECORDED / "based")
    conv, linear, window = model.mixers
    assert conv == ShortConv()
    assert linear == TaylorLinear(num_heads=2, feature_dim=4)
    # `window_size` counts the keys to both sides.
    assert window == SlidingWindow(num_heads=2, window=4)
    assert model.vocab_size == 48  # 45, padded to a multiple of 8


def test_tensors_of_the_authors_trainer_are_known(tmp_path):
    """The prefix of the module that trained them, its counters, and a decay that their forward pass does not use."""

    def change(given):
        extra = {
            "val_metrics.num-tokens.count": np.array(7, np.int64),
            "model.transformer.decay.decay": np.ones(2, np.float32),
        }
        return {f"model.{name}": tensor for name, tensor in given.items()} | extra

    folder = variant(tmp_path / "folder", "based", change=change, fixed_decay=True, decay_const=-3)
    assert same(load_hf(folder), load_hf(RECORDED / "based"))


def test_a_config_without_an_architecture_is_told_by_its_entries(tmp_path, caplog):
    folder = variant(tmp_path / "folder", "based", architectures=None)
    assert same(load_hf(folder), load_hf(RECORDED / "based"))
    told = {"architectures": ["LlamaForCausalLM"], "kv_sharing": None}
    folder = variant(tmp_path / "llama", "recursive", **told)
    assert same(load_hf(folder), load_hf(RECORDED / "recursive"))
    assert "not known" not in caplog.text


@pytest.mark.parametrize("family", ["recursive", "mor_token"])
def test_a_shared_parameter_may_be_there_under_one_name_alone(family, tmp_path):
    """As safetensors write tensors that share memory, whichever of the names that leaves."""
    seen = {}

    def change(given):
        for name, tensor in reversed(given.items()):
            seen.setdefault(tensor.tobytes(), name)
        return {name: given[name] for name in seen.values()}

    folder = variant(tmp_path / "folder", family, change=change)
    assert len(tensors(folder)) < len(tensors(RECORDED / family))
    assert same(load_hf(folder), load_hf(RECORDED / family))


@pytest.mark.parametrize(
    "family", ["mor_expert", pytest.param("recursive", marks=pytest.mark.slow)]
)
def test_scanned_recursions_are_saved_as_the_others(family, tmp_path):
    model, variables = load_hf(RECORDED / family, scan_layers=True)
    save_hf(tmp_path / "saved", model, variables)
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(RECORDED / family))


@pytest.mark.parametrize(
    ("sharing", "groups"),
    [
        ("sequence", [[0, 1], [2, 3], [4, 5]]),
        ("middle_cycle", [[0], [1, 3], [2, 4], [5]]),
        pytest.param("cycle", [[0, 3], [1, 4], [2, 5]], marks=pytest.mark.slow),
        pytest.param("middle_sequence", [[0], [1, 2], [3, 4], [5]], marks=pytest.mark.slow),
    ],
)
def test_layers_that_share_are_saved_each(sharing, groups, tmp_path, rng):
    model = load_hf(RECORDED / "recursive")[0].clone(depth=Recursive(2, sharing))
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_hf(tmp_path / "saved", model, variables)
    found = {}
    for layer in range(6):
        up = tensors(tmp_path / "saved")[f"model.layers.{layer}.mlp.up_proj.weight"]
        found.setdefault(up.tobytes(), []).append(layer)
    assert list(found.values()) == groups
    again, same_variables = load_hf(tmp_path / "saved")
    assert same((spelled_out(again), same_variables), (spelled_out(model), variables))


def test_recursions_share_only_what_is_equal(tmp_path):
    change = lambda given: {**given, ATTENTION: given[ATTENTION] + 1}  # noqa: E731
    folder = variant(tmp_path / "folder", "mor_expert", change=change)
    first = ATTENTION.replace("layers.1", "layers.0")
    with pytest.raises(InteropError, match=f"{first} and {ATTENTION} differ"):
        load_hf(folder)
    untied = changed("mor_expert", "recursive", sharing="untied")
    model, variables = load_hf(variant(tmp_path / "own", "mor_expert", change=change, **untied))
    recursions = [variables["params"]["depth"][f"shared_{r}"]["blocks_1"] for r in (0, 1)]
    first, second = (recursion["mixer"]["query"]["kernel"] for recursion in recursions)
    np.testing.assert_allclose(second, first + 1, rtol=1e-6)
    np.testing.assert_array_equal(*(r["ffn"]["up"]["kernel"] for r in recursions))
    assert model.depth.sharing == "untied"


def test_norms_may_be_of_each_recursion():
    model, variables = load_hf(RECORDED / "mor_norms")
    assert model.depth.sharing == "middle_untied"
    first, second = (variables["params"]["depth"][f"shared_{r}"]["blocks_0"] for r in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, first["mixer"], second["mixer"])
    assert not np.allclose(first["mixer_norm"]["scale"], second["mixer_norm"]["scale"])


def test_pickle_is_never_read(tmp_path):
    folder = variant(tmp_path / "folder", "mor_token")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InteropError, match=r"pickle is not read.*pytorch_model\.bin"):
        load_hf(folder)


def changed(family, section, **entries):
    """A section of a recorded config with other entries."""
    return {section: {**config(RECORDED / family)[section], **entries}}


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        (
            "based",
            {"rotary_emb_fraction": 0.5},
            "rotary_emb_fraction=0.5 is not supported; valid: 0, 1",
        ),
        ("based", {"mlp_fc1_bias": True}, "mlp_fc1_bias and mlp_fc2_bias differ"),
        ("based", {"alt_mixer_layers": [9]}, "alt_mixer_layers has 9; valid: 0 to 5"),
        (
            "based",
            {"alt_mixer_2": None},
            "alt_mixer_2 is missing; valid: one of .*'SlidingAttention'",
        ),
        (
            "based",
            changed("based", "alt_mixer", _target_="hyena.Hyena"),
            "alt_mixer: _target_ is 'Hyena'; valid: one of .*'LinearAttention'",
        ),
        (
            "based",
            changed("based", "alt_mixer", feature_map={"_target_": "x.TaylorExp", "input_dim": 8}),
            "feature_map: input_dim=8 is not supported; valid: 4",
        ),
        (
            "based",
            changed("based", "mixer", expand_proj=3),
            "expand_proj=3 is not supported; valid: even",
        ),
        (
            "recursive",
            changed("recursive", "recursive", ln_share=False, sharing="middle"),
            "unknown sharing 'middle'",
        ),
        (
            "recursive",
            changed("recursive", "recursive", num_recursion=3),
            "num_layers=6 with sharing='middle_sequence' and num_recursions=3; valid: num_layers of 5, 8",
        ),
        (
            "recursive",
            changed("recursive", "kv_sharing", enable=True),
            "kv_sharing: enable=True without",
        ),
        (
            "mor_expert",
            changed("mor_expert", "mor", type="token", token={}),
            "mor: type='token' with 'cycle'; valid: middle_cycle",
        ),
        (
            "mor_expert",
            changed("mor_expert", "mor", capacity="0.5,1.0"),
            "valid: within .* and not increasing",
        ),
        (
            "mor_token",
            changed("mor_token", "mor", rand_router=True),
            "rand_router=True is not supported",
        ),
        ("mor_token", {"relaxation": {"enable": True}}, "relaxation: enable=True is not supported"),
    ],
)
def test_configs(family, entries, message, tmp_path):
    with pytest.raises(InteropError, match=message) as refused:
        load_hf(variant(tmp_path / "folder", family, **entries))
    assert "config.json" in str(refused.value)


def test_mor_is_the_model_of_the_zoo():
    model, _ = load_hf(RECORDED / "mor_expert")
    assert isinstance(model.depth, MixtureOfRecursions)
    assert model.depth.routing.capacities_now(2) == (1.0, 0.5)
    assert load_hf(RECORDED / "mor_token")[0].depth.kv_sharing == "shared"
