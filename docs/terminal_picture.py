"""Draw the README's picture of the command line: run a command, and show what it printed.

Run it as `python docs/terminal_picture.py`.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent / "images" / "plan.svg"
COMMAND = ("pfsurgery", "plan", "--model", "resnet50", "--policy", "eff_hybrid")
WIDTH = 108
# The font that Rich asks for lies elsewhere: nothing is fetched, any monospaced one will do.
_FETCHED = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main() -> None:
    """Write docs/images/plan.svg."""
    coloured = {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(WIDTH)}
    printed = subprocess.run(
        COMMAND, env={**os.environ, **coloured}, capture_output=True, check=True
    ).stdout.decode()
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {' '.join(COMMAND)}", style="bold"))
    console.print(Text.from_ansi(printed))
    drawn = console.export_svg(title="", font_aspect_ratio=0.61)
    PICTURE.write_text(_FETCHED.sub("", drawn).replace("Fira Code", "ui-monospace"), "utf-8")


if __name__ == "__main__":
    main()
