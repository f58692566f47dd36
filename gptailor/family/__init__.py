"""A family: a base model and its fine-tunes (candidates), checked before it is opened, and opened without waste."""

from gptailor.family.models import Family, open_family
from gptailor.family.preflight import Preflight, preflight

__all__ = ["Family", "Preflight", "open_family", "preflight"]
