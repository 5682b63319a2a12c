"""JSON on one line, for readers that take more characters for line ends than JSON does."""

import json
from typing import Any

# Where `str.splitlines` ends a line, and with it httpx's reader of event streams; JSON escapes the
# others itself. A model may write them like any letter.
_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def one_line(value: Any) -> str:
    """Writes JSON that no reader of lines can cut."""
    return json.dumps(value, ensure_ascii=False).translate(_ENDS)
