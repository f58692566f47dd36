"""Everything about runs on disk: the engine's writer, the readers, the folder, and all the SQL there is."""

from gptailor.store.folder import RunFolder, new_run_id, run_folders
from gptailor.store.writer import RunWriter

__all__ = ["RunFolder", "RunWriter", "new_run_id", "run_folders"]
