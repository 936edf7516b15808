"""JSON files whose text stays text: the datasets library makes timestamps of what looks like a date."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json import json as reader

# The reader's own default, spelt out: it gives what is read here a place of its own in the cache of datasets.
IN_A_CACHE_OF_ITS_OWN = {"encoding_errors": "strict"}


def load_with_text(*where: Any, **options: Any) -> Dataset | DatasetDict:
    """`datasets.load_dataset`, but text in JSON files that looks like a date, also within lists and dicts, stays text.

    Such a file is read twice; all others are read, and cached, as that function does it.
    """
    try:
        loaded = load_dataset(*where, **options)
    except DatasetGenerationError as error:  # as where dates come first in a column, and other text later
        try:
            return _load_as_text(*where, **options)
        except Exception:
            raise error from error.__cause__
    parts = loaded.values() if isinstance(loaded, dict) else [loaded]
    has_dates = any(
        part.info.builder_name == "json" and _undated(s := part.features.arrow_schema) != s for part in parts
    )
    if not has_dates:
        return loaded
    try:
        return _load_as_text(*where, **options)
    except Exception as error:  # as where the hub can't be reached, and the cache is of before
        raise ValueError(
            "it has text that looks like a date, and must be read once more, to keep it text, where its files can be "
            "reached"
        ) from error


def _load_as_text(*where: Any, **options: Any) -> Any:
    with _no_dates():
        return load_dataset(*where, **options, **IN_A_CACHE_OF_ITS_OWN)


@contextmanager
def _no_dates() -> Iterator[None]:
    """Inside, the library's reader of JSON takes nothing for a date, neither Arrow's part of it nor that of pandas."""
    plain = partial(reader.pandas_read_json, dtype=False)
    infer = reader.paj.read_json

    def read_json(file: io.BytesIO, **options: Any) -> pa.Table:
        table = infer(file, **options)
        schema = _undated(table.schema)
        if schema == table.schema:
            return table
        file.seek(0)
        return infer(file, **options, parse_options=reader.paj.ParseOptions(explicit_schema=schema))

    with patch.object(reader.paj, "read_json", read_json), patch.object(reader, "pandas_read_json", plain):
        yield


def _undated(schema: pa.Schema) -> pa.Schema:
    return pa.schema([_undated_field(field) for field in schema])


def _undated_field(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_timestamp(kind):
        return field.with_type(pa.string())
    if pa.types.is_list(kind):
        return field.with_type(pa.list_(_undated_field(kind.value_field)))
    if pa.types.is_struct(kind):
        return field.with_type(pa.struct([_undated_field(part) for part in kind]))
    return field
