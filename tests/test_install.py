"""The set-up script: it takes no other bytes than those it knows. CI itself runs the whole of it."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from common import install


@pytest.fixture
def url(tmp_path):
    (tmp_path / "pip.py").write_bytes(b"print('pip')")

    def handler(*args):
        return http.server.SimpleHTTPRequestHandler(*args, directory=tmp_path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/pip.py"
    server.shutdown()
    server.server_close()


def test_known_bytes_are_taken_and_others_refused(url):
    good = hashlib.sha256(b"print('pip')").hexdigest()
    assert install.fetch(url, good) == b"print('pip')"
    with pytest.raises(SystemExit, match="is not what it should be; install python3-venv instead"):
        install.fetch(url, install.SHA256)


def test_no_network_ends_in_one_sentence(url):
    for missing in (url + "x", "http://127.0.0.1:1/pip.py"):
        with pytest.raises(SystemExit, match="cannot be fetched .*without a network, install python3-venv"):
            install.fetch(missing, install.SHA256)


def test_an_old_python_and_a_failing_step_end_in_one_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(install.sys, "version_info", (3, 10, 0))
        with pytest.raises(SystemExit, match="Python 3.11 or newer is needed"):
            install.main([])
    monkeypatch.setattr(install.sys, "executable", "false")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    with pytest.raises(SystemExit, match="failed with exit code 1; its message stands above"):
        install.main([])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", ["libero", "robosuite", "maniskill", "driving", "dmc", "ogbench", "warp"])
def test_a_world_comes_without_its_own_dependencies(tmp_path, monkeypatch, world):
    commands, done = [], install.subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(install.subprocess, "run", lambda step, check: commands.append(step) or done)
    monkeypatch.setattr(install, "VENV", tmp_path)
    install.main([])
    plain = len(commands)
    install.main([f"--{world}"])
    files = [world, "libero-assets"] if world == "libero" else [world]
    assert commands[plain : -len(files)] == commands[:plain]
    for file, command in zip(files, commands[-len(files) :], strict=True):
        wanted = ["install", "--quiet", "--no-deps", "-r", str(install.ROOT / f"requirements-{file}.txt")]
        assert command[-5:] == wanted and Path(wanted[-1]).is_file()
    with pytest.raises(SystemExit, match="takes some of .*--libero, .* or nothing, not --liber"):
        install.main(["--liber"])
