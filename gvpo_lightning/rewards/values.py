"""What a dataset's values read as: as text, and as JSON.

Reward workers import this: it must not import torch.
"""

import json
import math
from decimal import Decimal
from numbers import Real
from typing import Any


def is_missing(value: Any) -> bool:
    """Whether it is null, or the NaN that stands for null in a column of floats."""
    return value is None or (isinstance(value, (Real, Decimal)) and value != value)


def as_written(value: Any) -> Any:
    """A number as the dataset's author wrote it: 72.0 is 72, as a column with a 0.5 in it turns every 72 into 72.0.

    So are those in a list. All else comes back as it is, and so do numbers that Python would write with an exponent.
    """
    if isinstance(value, list):
        return [as_written(entry) for entry in value]
    is_float = isinstance(value, (Real, Decimal)) and not isinstance(value, (int, bool)) and math.isfinite(value)
    return int(value) if is_float and abs(value) < 1e16 and value == int(value) else value


def as_text(value: Any) -> str:
    """The text of a value: numbers as they were written, bytes as UTF-8, what else there is as Python shows it."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(as_written(value))


def as_json(value: Any) -> Any:
    """The same of what JSON has: arrays are lists, numbers that are not finite null, dates and the like text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {as_text(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    return as_json(value.tolist()) if hasattr(value, "tolist") else as_text(value)


def json_line(value: Any) -> str:
    """One line of a JSON lines file, whatever the values are; half a surrogate pair, which is no text, becomes a ?."""
    return json.dumps(as_json(value), ensure_ascii=False).encode(errors="replace").decode() + "\n"
