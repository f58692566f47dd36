"""What a saved run asked, for those who go on with it: its run file, and the number of layers that this came to."""

from __future__ import annotations

from collections.abc import Sequence

from gptailor.spec.files import load_spec
from gptailor.spec.run import RunSpec
from gptailor.spec.sections import Removal
from gptailor.store import queries
from gptailor.store.folder import RunFolder


def spec_of(folder: RunFolder, changes: Sequence[str] = ()) -> RunSpec:
    """The run's file, with the number of layers that it removes where `remove` says another measure.

    It is worked out when a run begins, and stored: what a speed comes to is measured, and is never measured again. As
    the file says it where the run has not begun. changes: `key=value`. Raises UserError, StoreError.
    """
    spec = load_spec(folder.spec, [*changes])
    if spec.has_range or not isinstance(spec.remove, Removal) or not folder.exists():
        return spec
    n_removed = int(queries.read_scores(folder).runs["n_removed"].fillna(0).iloc[0])
    return spec.removing(n_removed) if n_removed else spec
