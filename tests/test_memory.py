"""The memory that is left, in made-up control groups."""

import psutil
import pytest

from common import memory

MB = 2**20


@pytest.fixture
def group(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    machine = psutil.virtual_memory()._replace(available=900 * MB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    (tmp_path / "own").write_text("12:cpu,cpuacct:/\n4:memory:/job/step\n0::/job/step\n")

    def write(folder, **files):
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (tmp_path / "groups" / folder / f"memory.{name}").write_text(value)

    return write


def test_without_a_limit(group, monkeypatch, tmp_path):
    assert memory.available_memory() == 900 * MB
    stat = f"inactive_file {MB}\nactive_file 0\n"
    group("job/step", max="max\n", current=f"{800 * MB}\n", stat=stat)
    assert memory.available_memory() == 900 * MB
    group("job", max=f"{9000 * MB}\n", current=f"{800 * MB}\n", stat=stat)  # more than the machine has
    assert memory.available_memory() == 900 * MB
    monkeypatch.setattr(memory, "OWN", tmp_path / "nothing")  # another system than Linux
    assert memory.available_memory() == 900 * MB


@pytest.mark.parametrize("folder", ["job/step", "job", "."])  # "." is how a container sees its own
def test_limit_of_version_2(group, folder):
    stat = f"anon 7\ninactive_file {30 * MB}\nactive_file {20 * MB}\n"
    group(folder, max=f"{500 * MB}\n", current=f"{400 * MB}\n", stat=stat)
    assert memory.available_memory() == 150 * MB  # files' cache gives way
    group(folder, current=f"{600 * MB}\n")
    assert memory.available_memory() == 0


@pytest.mark.parametrize("folder", ["memory/job/step", "memory/job", "memory"])
def test_limit_of_version_1(group, folder):
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {30 * MB}\ntotal_active_file {20 * MB}\n"
    group(folder, limit_in_bytes=f"{500 * MB}\n", usage_in_bytes=f"{400 * MB}\n", stat=stat)
    assert memory.available_memory() == 150 * MB
