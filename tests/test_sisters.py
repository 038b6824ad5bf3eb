"""What two single-file scripts share is identical to the letter: their diff shows the algorithms alone."""

import inspect

import pytest

import bc_warmup
import ppo_vla

SHARED = (
    "TokenHead GaussianHead wilson_interval summarize evaluate score choose_device build_envs main".split()
)


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_are_identical(name):
    assert inspect.getsource(getattr(ppo_vla, name)) == inspect.getsource(getattr(bc_warmup, name))
