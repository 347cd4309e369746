"""The page: a template, a stylesheet and a script, in one file. Nothing is fetched, and only its script runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

HERE = Path(__file__).parent
MARK = "<!-- linearize report -->"
"""By which a report is known, so that only a report is replaced by one."""


def page(*, name: str, lede: str, cards: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The file's text.

    Args:
        name, lede, footer: plain text.
        cards: HTML.
        sections: (id, title in the navigation, HTML) each; empty ones are left out.
    """
    kept = [(key, title, body) for key, title, body in sections if body]
    script = (HERE / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{name} - linearize"),
        style=(HERE / "style.css").read_text(encoding="utf-8").strip(),
        script=script,
        script_digest=digest,
        navigation="".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in kept),
        name=escape(name),
        lede=escape(lede),
        cards=cards,
        sections="\n".join(body for _, _, body in kept),
        footer=escape(footer),
    )
