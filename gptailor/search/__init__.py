"""The engine and its search: what is asked for, in which order, what is written, and when it ends."""
