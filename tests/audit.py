"""Has anything that is installed here a known vulnerability? `make test` asks.

One request to OSV, the database that pip-audit reads too, for all packages at once: pip-audit asks for each by itself,
which takes longer than this may. A vulnerability fails; a network that is away does not, and is said.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import sys
import urllib.request

DATABASE = os.environ.get("OSV_URL", "https://api.osv.dev")
SECONDS = 15
ACCEPTED: dict[str, str] = {}
"""Id of a vulnerability -> why it does not concern us. Empty it again when a release mends it."""


def installed() -> list[tuple[str, str]]:
    """Name and version of every package of this environment."""
    found = {(d.metadata["Name"], d.version.partition("+")[0]) for d in importlib.metadata.distributions()}
    return sorted((name, version) for name, version in found if name and name != "gptailor")


def vulnerabilities(packages: list[tuple[str, str]]) -> list[str]:
    """A line for each package that has some. Raises OSError where nobody answers, ValueError for no real answer."""
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages]
    body = json.dumps({"queries": queries}).encode()
    asked = urllib.request.Request(f"{DATABASE}/v1/querybatch", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
        results = json.load(answer)["results"]
    lines = []
    for (name, version), result in zip(packages, results, strict=True):
        ids = [found["id"] for found in (result or {}).get("vulns", ()) if found["id"] not in ACCEPTED]
        if ids:
            lines.append(f"{name} {version}: " + ", ".join(f"https://osv.dev/{known}" for known in ids))
    return lines


def main() -> int:
    packages = installed()
    try:
        lines = vulnerabilities(packages)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        print(f"{len(packages)} packages could not be audited: {DATABASE} gave no answer ({reason})")
        return 0
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{len(packages)} packages audited: {len(lines)} with a known vulnerability")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
