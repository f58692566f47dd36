"""The data step of every figure: DataFrames in, DataFrames out, tested on values. One module a page.

Frames are shared between readers of a page and are never changed in place.
"""
