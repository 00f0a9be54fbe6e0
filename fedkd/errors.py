"""The one exception that reaches the user as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: an unknown name, a value out of range, data that cannot be read.

    The message names the rule, the value, whose it is and the likely fix.  The command line prints it as one line
    and exits with code 2; nothing has been started by then.  What cannot be printed in it, which is then the user's own
    word, is written as its escape, so that one line it stays.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""
