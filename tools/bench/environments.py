"""The virtual environments: our own from tools/setup; each peer's in .venvs/NAME from peers/NAME.txt."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from methods import OWN

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent.parent


def python_of(environment: str) -> Path:
    """The interpreter of `environment`, made or brought up to date first; quick when nothing changed.

    Raises subprocess.CalledProcessError when installing fails.
    """
    if environment == OWN:
        subprocess.run([ROOT / "tools" / "setup"], check=True)
        return ROOT / ".venv" / "bin" / "python"
    requirements = BENCH / "peers" / f"{environment}.txt"
    folder = ROOT / ".venvs" / environment
    python = folder / "bin" / "python"
    stamp = folder / ".stamp"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"making .venvs/{environment} from {requirements.relative_to(ROOT)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--requirement", str(requirements)], check=True)
    stamp.write_text(digest)
    return python
