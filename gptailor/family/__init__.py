"""A family: a base model and its fine-tunes (candidates), checked before it is opened, and opened without waste."""
