"""What several test files share."""

import importlib.util
import os
import tarfile
from pathlib import Path

import pytest

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "libero_assets.tar.xz"


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """LIBERO is installed, and LIBERO_ASSETS names its assets: the user's, or the unpacked archive."""
    if not all(importlib.util.find_spec(name) for name in ("robosuite", "libero", "bddl")):
        pytest.skip("LIBERO IS NOT INSTALLED, ITS WORLD IS NOT TESTED: python3 common/install.py --libero")
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("LIBERO_ASSETS"):
            if not ARCHIVE.is_file():
                pytest.skip(f"LIBERO_ASSETS IS NOT SET AND {ARCHIVE} NOT THERE, LIBERO'S WORLD IS NOT TESTED")
            folder = tmp_path_factory.mktemp("libero")
            with tarfile.open(ARCHIVE) as archive:
                archive.extractall(folder, filter="data")
            patch.setenv("LIBERO_ASSETS", str(next(folder.glob("**/scenes")).parent))
        yield
