"""gptailor: make a large language model shorter by cutting and stitching layers of the model and its fine-tunes.

The names below are for scripts and notebooks (docs/notebooks.md). Each brings what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptailor.versions import VERSION

if TYPE_CHECKING:
    from gptailor.errors import UserError
    from gptailor.family.models import open_family
    from gptailor.formats.published import read_plan
    from gptailor.notebooks import export_model, make_plan, open_run, run_search, score_plans, stitch_model
    from gptailor.spec.files import load_spec as load_run_file

__version__ = VERSION
__all__ = (
    "UserError",
    "export_model",
    "load_run_file",
    "make_plan",
    "open_family",
    "open_run",
    "read_plan",
    "run_search",
    "score_plans",
    "stitch_model",
)
_ELSEWHERE = {
    "UserError": "gptailor.errors.UserError",
    "load_run_file": "gptailor.spec.files.load_spec",
    "open_family": "gptailor.family.models.open_family",
    "read_plan": "gptailor.formats.published.read_plan",
}
"""Where names of __all__ are defined; the others, in gptailor/notebooks.py."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, defined = _ELSEWHERE.get(name, f"gptailor.notebooks.{name}").rpartition(".")
    return getattr(import_module(module), defined)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
