"""How does a value from a profile stand in a shell script, where `$NAME` means the node's?"""

from __future__ import annotations

import re

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expanding(text: str) -> str:
    """One shell word: `$NAME`, `${NAME}` and a leading `~` are expanded on the node, all else stands for itself.

    A `$` with anything else behind it, backticks, quotes and blanks are plain characters. Under `set -u` a variable
    that the node does not have ends the script with its name.
    """
    if text == "~" or text.startswith("~/"):
        text = f"$HOME{text[1:]}"
    parts, end = [], 0
    for found in _VARIABLE.finditer(text):
        parts += [_escaped(text[end : found.start()]), f"${{{found[1] or found[2]}}}"]
        end = found.end()
    return f'"{"".join(parts)}{_escaped(text[end:])}"'


def is_expanding(text: str) -> bool:
    """Whether the word means something else on another machine."""
    return text.startswith("~") or _VARIABLE.search(text) is not None


def _escaped(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)
