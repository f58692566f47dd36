"""Stitching: a plan and a family give a live model; several candidates' layers are merged on the way."""

from gptailor.stitch.merging import merge_method_problem, merge_methods, merge_source_counts
from gptailor.stitch.stitcher import Stitcher

__all__ = ["Stitcher", "merge_method_problem", "merge_methods", "merge_source_counts"]
