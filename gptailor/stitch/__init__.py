"""Stitching: a plan and a family give a live model; several candidates' layers are merged on the way."""
