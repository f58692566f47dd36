"""Healing: a short training of a cut model on what its teacher says, the only place where anything is trained."""
