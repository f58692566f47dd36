"""gptailor's version, and which versions of which packages a run's results depend on."""

from __future__ import annotations

import platform

VERSION = "0.2.0"
"""gptailor's own."""
PACKAGES = ("torch", "transformers", "smac", "ConfigSpace", "scikit-learn", "lm-eval", "duckdb", "mergekit")


def installed_versions() -> dict[str, str]:
    """What the run's results depend on: a replay on other versions may depart."""
    from importlib.metadata import PackageNotFoundError, version  # slower to import than all of `--help`

    found = {"python": platform.python_version(), "gptailor": VERSION}  # a checkout's, whatever is installed
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
