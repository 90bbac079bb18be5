"""The plan of a decoding step beside what its parts are known to take."""

import pytest

from effjax import models
from effjax.models import state_size
from effjax.training import config as configs
from effjax.training import planning
from pallas_kernels import topology
from pallas_kernels.chips import CHIPS

BATCH, CONTEXT = 16, 64


@pytest.fixture(scope="module", params=["transformer", pytest.param("mor", marks=pytest.mark.slow)])
def config(request):
    config = configs.default(request.param, d_model=32, num_layers=5, scan_layers=True)
    config.mesh.update(data=4, fsdp=2)
    return config


def bytes_of_caches(config):
    return BATCH * state_size(models.create(**configs.resolve(config)["model"]), CONTEXT)[-1].bytes


def test_a_chip_holds_its_share_of_the_caches(config):
    plan = planning.plan_decoding(config, "cpu", batch_size=BATCH, context=CONTEXT)
    assert plan.memory.other == pytest.approx(bytes_of_caches(config) / 8, rel=0.05)
    assert plan.memory.optimizer == 0
    assert plan.tokens == BATCH
    # A step is one token a text: two operations a weight, and little more at this context.
    weights = plan.memory.parameters * 2 / 4
    assert plan.model_flops > 2 * weights * BATCH * 0.9
    assert plan.training_tokens is None


@pytest.mark.parametrize(
    ("batch", "context", "message"),
    [
        (12, 8, "plan.decode_batch=12; valid: a multiple of 8"),
        (8, 10**6, "max_length=1000000; valid: 1 to"),
    ],
)
def test_what_cannot_decode_is_refused(config, batch, context, message):
    with pytest.raises(ValueError, match=message):
        planning.plan_decoding(config, "cpu", batch_size=batch, context=context)


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available(), reason="needs libtpu")
def test_on_a_tpu_a_token_takes_at_least_the_reading_of_weights_and_caches(config):
    config.mesh.update(data=1, fsdp=1)
    plan = planning.plan_decoding(config, "v5e", batch_size=BATCH, context=CONTEXT)
    assert plan.memory.fits
    # What tiles of the chip's memory are padded with is not read.
    read = (plan.memory.parameters + bytes_of_caches(config)) / CHIPS["v5e"].hbm_bytes_per_second
    assert plan.pace.seconds > plan.pace.roofs["memory"] > 0.9 * read
