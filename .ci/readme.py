"""The code blocks of README.md, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks() -> list[str]:
    """Return the text of each code block, fenced or indented, in the order of the file."""
    found = []
    pattern = r"^```[a-z]+\n(.*?)^```$|((?:^    [^\n]*\n|^\n(?=    ))+)"
    for match in re.finditer(pattern, README.read_text(), re.MULTILINE | re.DOTALL):
        fenced, indented = match.groups()
        text = fenced if indented is None else re.sub("^    ", "", indented, flags=re.MULTILINE)
        found.append(text.strip("\n") + "\n")
    return found


def block(part: str) -> str:
    """Return the only code block that contains the given text."""
    (found,) = [text for text in blocks() if part in text]
    return found


def line(part: str) -> str:
    """Return the only line of a code block that contains the given text, without the comment at its end."""
    (found,) = [row for text in blocks() for row in text.splitlines() if part in row]
    return re.sub(r" {2,}#.*", "", found)
