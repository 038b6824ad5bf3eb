"""Make .venv and install requirements.txt into it, with nothing but Python 3.11 or newer.

    python3 common/install.py [--libero | --robosuite | --ogbench]     # with its requirements-<world>.txt too

Debian's and Ubuntu's own Python comes without ensurepip. Then pip's installer is fetched, and its hash
checked: such a system may have no certificates either.
"""

import hashlib
import importlib.util
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

GET_PIP = "https://raw.githubusercontent.com/pypa/get-pip/26.1.1/public/get-pip.py"
SHA256 = "66904bccb878e363db6236ea900e6935e507dcb887e9f178f6212edfe7f46a76"
ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"


def fetch(url, sha256):
    try:
        with urllib.request.urlopen(url, timeout=60, context=ssl._create_unverified_context()) as answer:
            content = answer.read()
    except OSError as error:
        sys.exit(f"error: {url} cannot be fetched ({error}); without a network, install python3-venv.")
    if hashlib.sha256(content).hexdigest() != sha256:
        sys.exit(f"error: {url} is not what it should be; install python3-venv instead.")
    return content


def main(options):
    worlds = {"--robosuite": ["robosuite"], "--libero": ["libero", "libero-assets"], "--ogbench": ["ogbench"]}
    if options and (len(options) > 1 or options[0] not in worlds):
        known = ", ".join(sorted(worlds))
        sys.exit(f"error: common/install.py takes one of {known} or nothing, not {' '.join(options)}.")
    if sys.version_info < (3, 11):  # noqa: UP036 (this file alone is met by older ones)
        sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}.")
    has_pip = importlib.util.find_spec("ensurepip") is not None
    python = VENV / "bin" / "python"
    steps = [[sys.executable, "-m", "venv", *([] if has_pip else ["--without-pip"]), str(VENV)]]
    if not has_pip and not (VENV / "bin" / "pip").exists():
        script = ROOT / ".get-pip.py"
        script.write_bytes(fetch(GET_PIP, SHA256))
        steps.append([str(python), str(script), "--quiet"])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    steps.append([*pip, "-r", str(ROOT / "requirements.txt")])
    for file in [file for option in options for file in worlds[option]]:
        steps.append([*pip, "--no-deps", "-r", str(ROOT / f"requirements-{file}.txt")])
    try:
        for step in steps:
            if code := subprocess.run(step, check=False).returncode:
                sys.exit(f"error: {' '.join(step)} failed with exit code {code}; its message stands above.")
    finally:
        (ROOT / ".get-pip.py").unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
