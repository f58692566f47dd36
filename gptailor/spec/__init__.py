"""Run files: what a person asks of a search."""
