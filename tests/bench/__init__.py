"""Measurements and long proofs, run by hand or by `make`; their short forms are tests."""
