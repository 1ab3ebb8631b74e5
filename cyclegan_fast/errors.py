"""The base of all errors that are the user's to mend, and how they show names that others chose."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: a setting, a file, a checkpoint. The message names it, its value, and what would be right."""

    def __str__(self) -> str:
        return "\n".join(shown(line) for line in super().__str__().split("\n"))


def shown(name: object) -> str:
    """A file's name, or other text from outside, for a terminal or a log.

    Escaped is what is no printable character: control characters, which could move the cursor or forge a line, and
    bytes that are not UTF-8, which could not be printed.
    """
    text = str(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
