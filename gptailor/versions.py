"""Which versions of which packages a run's results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from gptailor import __version__

PACKAGES = ("gptailor", "torch", "transformers", "smac", "ConfigSpace", "scikit-learn", "lm-eval", "duckdb", "mergekit")


def installed_versions() -> dict[str, str]:
    """What the run's results depend on: a replay on other versions may depart."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = __version__ if package == "gptailor" else "absent"
    return found
