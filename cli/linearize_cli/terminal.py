"""What may reach a terminal: words of checkpoints, files and models, without what would steer it.

A name in a config, or a generated text, may hold escape sequences that move the cursor, hide lines, set the clipboard.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tabs and ends of lines."""


def clean(text: str) -> str:
    """`text` with a space in the place of every control character but tabs and ends of lines."""
    return _CONTROL.sub(" ", text)


def print_text(text: str) -> None:
    """A model's words on stdout: every byte to a file or a pipe; on a terminal control characters are written out."""
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    print(text)


def cleaned_console(**how: Any) -> Console:
    """A rich console whose texts are cleaned; its own colours are not."""
    from rich.console import Console

    class Cleaned(Console):
        def render_str(self, text: str, **more: Any) -> Any:
            return super().render_str(clean(text), **more)

    return Cleaned(**how)
