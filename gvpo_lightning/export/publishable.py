"""What of a config may be shown to everyone."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET = re.compile(r"key|secret|passw|credential|auth|bearer|token", re.IGNORECASE)
NOT_SECRET = re.compile(
    r"(.*_env|(eos|bos|pad|unk)_token|.*_token_i\w+|stop_.*|(.*_)?tokens|tokenizer.*|token_logprobs)", re.IGNORECASE
)
URL = re.compile(r"([A-Za-z][\w+.-]*)://(?:[^/\s]*@)?([^\s?#]*)(?:[?#]\S*)?")
PATH = re.compile(r"(?:(?<![^=,:])(?:/|~|[A-Za-z]:[\\/])|(?<![^=,:])[^=,:]*\.\.[\\/])[^=,]*")


def publishable(value: Any, key: str = "") -> Any:
    """A config without what is not set or is secret; absolute paths, which are of one machine, by their last part.

    A key that sounds like a secret hides all that is under it. URLs lose user, password and query.
    """
    if value is None or isinstance(value, bool):
        return value
    if SECRET.search(key) and not NOT_SECRET.fullmatch(key):
        return "(left out)"
    if isinstance(value, Mapping):
        shown = {str(publishable(name)): publishable(part, str(name)) for name, part in value.items()}
        return {name: part for name, part in shown.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [publishable(part, key) for part in value]
    if isinstance(value, Path):
        return _last_part(str(value))
    if isinstance(value, (int, float)):
        return value
    return _publishable_text(str(value))


def _publishable_text(text: str) -> str:
    if re.match(r"[/~]", text) and os.path.exists(os.path.expanduser(text)):  # a path even if it has spaces
        return _last_part(text)
    text = URL.sub(lambda url: _last_part(url[2]) if url[1] == "file" else f"{url[1]}://{url[2]}", text)
    if "://" in text or re.search(r"[\s{}]", text):  # such as a prompt's template
        return text
    return PATH.sub(lambda path: _last_part(path[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
