"""Records of a run file, whose fields say in a sentence each what their keys mean."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Record(BaseModel):
    """The text below a field says what its key means.

    The reference page, the JSON schema and the Launch page's help are made of it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, serialize_by_alias=True
    )


def fields_of(record: type[BaseModel]) -> dict[str, FieldInfo]:
    """A record's fields by the keys that stand for them in a run file."""
    return {field.alias or name: field for name, field in record.model_fields.items()}


def record_of(annotation: Any) -> type[BaseModel] | None:
    """The record whose keys stand below a field of this type, if any do: Benchmark of tuple[Benchmark, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(record_of, get_args(annotation))), None)
