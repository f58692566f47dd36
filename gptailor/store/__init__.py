"""Everything about runs on disk: the engine's writer, the readers, the folder, and all the SQL there is."""
