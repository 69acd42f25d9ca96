"""The marked places of a write-up that hold the student's own text. Standard library only.

A place is `<!-- yours: NAME -->`, the text, `<!-- end of yours -->`. Everything outside the places
is generated, and a checksum in the last line shows whether it was edited.
"""

from __future__ import annotations

import hashlib
import re

PLACEHOLDER = "*Write here.*"
MISSING = "> **Missing.**"  # begins the line of a part that no run folder fills
START, END = "<!-- yours: {} -->", "<!-- end of yours -->"
PLACE = re.compile(r"<!-- yours: (.+?) -->\n(.*?)\n?<!-- end of yours -->", re.DOTALL)
CHECKSUM = re.compile(r"<!-- generated text: (\w+) -->\s*$")


def place(name: str, texts: dict[str, str]) -> str:
    """The marked place of this name, with the student's text or a placeholder."""
    return f"{START.format(name)}\n{texts.get(name) or PLACEHOLDER}\n{END}"


def read_places(markdown: str) -> dict[str, str]:
    """The student's texts by the name of their place.

    Raises:
        ValueError: a marker has no partner, or a name is there twice.
    """
    found = PLACE.findall(markdown)
    starts, ends = markdown.count("<!-- yours: "), markdown.count(END)
    names = [name for name, _ in found]
    if not len(found) == starts == ends or len(set(names)) < len(names):
        raise ValueError("the comments `yours` and `end of yours` do not pair up")
    return {name: text.strip() for name, text in found if text.strip() != PLACEHOLDER}


def add_checksum(markdown: str) -> str:
    """The text with the checksum of its generated part in the last line."""
    return f"{markdown.rstrip()}\n\n<!-- generated text: {checksum(markdown)} -->\n"


def was_edited(markdown: str) -> bool:
    """Whether text outside the marked places differs from what was generated."""
    recorded = CHECKSUM.search(markdown)
    return not recorded or recorded[1] != checksum(CHECKSUM.sub("", markdown))


def checksum(markdown: str) -> str:
    """Of the text outside the marked places."""
    generated = "\n".join(PLACE.sub("", markdown).split())
    return hashlib.sha256(generated.encode()).hexdigest()[:16]


def missing_parts(markdown: str) -> list[str]:
    """What a write-up still lacks, one line each: results, and the student's own text.

    Raises:
        ValueError: see `read_places`.
    """
    texts = read_places(markdown)
    lines = markdown.splitlines()
    results = [
        re.sub(r"\\(.)", r"\1", line.removeprefix(MISSING).strip())  # Markdown's escapes
        for line in lines
        if line.startswith(MISSING)
    ]
    empty = [name for name, _ in PLACE.findall(markdown) if not texts.get(name, "").strip()]
    return results + [f"your text: {name}" for name in empty]
