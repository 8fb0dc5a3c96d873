"""Makes README.md the long description of a release, with links that lead somewhere.

A package index shows the text alone, without the repository. So each link that is
relative to the repository becomes one to the repository at the tag of this version.
"""

import re
from pathlib import Path
from typing import Any

IMAGES = {".gif", ".jpg", ".png", ".svg"}
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def absolute(text: str, repository: str, version: str) -> str:
    """Returns Markdown whose links to files of the repository are absolute."""

    def replaced(link: re.Match[str]) -> str:
        path, anchor = link.group(1), link.group(2) or ""
        # An image must be named where its bytes are, not where it is shown.
        view = "raw" if Path(path).suffix in IMAGES else "blob"
        return f"]({repository}/{view}/v{version}/{path}{anchor})"

    return LINK.sub(replaced, text)


try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # only a build needs it
    pass
else:

    class LongDescription(MetadataHookInterface):
        """Enters the long description into the metadata."""

        def update(self, metadata: dict[str, Any]) -> None:
            """Sets `readme`."""
            text, init = (
                Path(self.root, name).read_text(encoding="utf-8")
                for name in ("README.md", "adam3_optax/__init__.py")
            )
            (version,) = re.findall(r'^__version__ = "(.*)"$', init, re.M)
            repository = metadata["urls"]["Repository"]
            metadata["readme"] = {
                "content-type": "text/markdown",
                "text": absolute(text, repository, version),
            }
