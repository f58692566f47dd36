"""Where is the data? What travels with gptailor besides its code: presets, the demo, benchmarks, experiments, pages.

In a checkout it lies beside the package, where people look for it; a wheel carries it inside the package (`files/`,
which pyproject.toml fills). Names stay the same: `data/presets/demo.yaml`, and the paths written in it, work from any
folder. A file of that name in the reader's own folder comes first.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = PACKAGE / "files"
ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else PACKAGE.parent
"""The folder that holds data/, pages/ and streamlit_app.py."""
PRESETS = Path("data/presets")


def find(path: str | Path) -> Path:
    """The path itself where something is there; else what is shipped under this name, if anything is."""
    own = Path(path).expanduser()
    if own.parts[:1] != ("data",) or ".." in own.parts or own.exists():
        return own
    shipped = ROOT / own
    return shipped if shipped.exists() else own


def name_of(path: Path) -> str:
    """The shortest name by which `find` gives this path here: data/presets/demo.yaml, wherever that is."""
    if path.is_relative_to(ROOT) and find(name := path.relative_to(ROOT)).resolve() == path.resolve():
        return str(name)
    return str(path)
