"""What rich draws, as text."""

from __future__ import annotations

from rich.console import Console, RenderableType


def printed(what: RenderableType, width: int = 120) -> str:
    """Lines of at most ``width`` characters, without colours."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()
