"""What two single-file scripts share is identical to the letter: their diff shows the algorithms alone."""

import inspect

import pytest

import bc_warmup
import grpo_vla
import ppo_vla

ALL = "TokenHead GaussianHead wilson_interval summarize evaluate score choose_device build_envs main".split()
ONLINE = "clipped_surrogate kl_k3 masked_mean DiscreteHead make_head".split()


@pytest.mark.parametrize(
    ("script", "name"), [(bc_warmup, name) for name in ALL] + [(grpo_vla, name) for name in ALL + ONLINE]
)
def test_shared_blocks_are_identical(script, name):
    assert inspect.getsource(getattr(ppo_vla, name)) == inspect.getsource(getattr(script, name))


def test_common_flags_have_the_same_help():
    """Also in the same order, so that the two files diff well."""
    names = [name for name in ppo_vla.Args.__dataclass_fields__ if name in grpo_vla.Args.__dataclass_fields__]
    assert names == [n for n in grpo_vla.Args.__dataclass_fields__ if n in ppo_vla.Args.__dataclass_fields__]
    assert len(names) > 35
