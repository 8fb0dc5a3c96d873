"""Docstrings as Markdown shows them best; the sources stay as they are.

The package's docstrings have a section `Example:`, and `::` before code, as Google's
style and Sphinx have them. Griffe knows `Examples:`, and Markdown needs one colon.
"""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Edits each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Edits the docstring of one object."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
