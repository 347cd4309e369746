"""What every section of the report is made of."""

from __future__ import annotations

from html import escape


def section(name: str, title: str, about: str, *parts: str) -> str:
    """One landmark of the page; "" where nothing is in it."""
    body = "".join(parts)
    if not body:
        return ""
    words = f"<p>{escape(about)}</p>" if about else ""
    head = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{head}{words}{body}</section>'


def missing(what: str, command: str) -> str:
    """The line that stands where a part would be."""
    return f'<p class="missing">{escape(what)} <code>{escape(command)}</code></p>'


def grid(*parts: str) -> str:
    """Charts beside each other where there is room."""
    kept = "".join(parts)
    return f'<div class="grid-2">{kept}</div>' if kept else ""


def columns(*parts: str) -> str:
    """Lists of different lengths, one below the other in as many columns as there is room for."""
    return f'<div class="columns">{"".join(parts)}</div>'
