"""Shows the doctests of docstrings as code, with their outputs.

A docstring has them without a fence, as the doctest runner reads them. This extension
of Griffe fences each run of lines from `>>>` to the next empty line.
"""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n.+|\n\n(?=>>> ))*", re.M)


class Fenced(griffe.Extension):
    """Fences the doctests of each object's docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = DOCTEST.sub("```pycon\n\\g<0>\n```", text)
