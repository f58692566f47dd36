"""Published pruning methods, one file each: each turns a `Case` into a plan. `registry.py` lists them."""
