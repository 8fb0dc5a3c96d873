"""Checks the built site: its links lead somewhere, and it loads nothing from elsewhere.

    python tools/check_site.py site

`mkdocs build --strict` checks the links of the Markdown pages. This reads the HTML, and
so it sees the links that a plugin or the theme has made, too.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes whose address a browser loads by itself. A link that a reader has to click
# may lead anywhere.
LOADED = {
    ("audio", "src"),
    ("embed", "src"),
    ("iframe", "src"),
    ("image", "href"),
    ("img", "src"),
    ("img", "srcset"),
    ("link", "href"),
    ("object", "data"),
    ("script", "src"),
    ("source", "src"),
    ("source", "srcset"),
    ("use", "href"),
    ("video", "src"),
}
# Parts of the theme that ask other hosts when they are on a page.
ASKING = 'data-md-component="source"', 'class="mermaid"'


class Document(HTMLParser):
    """The addresses and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps what one tag names."""
        if ("rel", "canonical") in attrs:
            return  # the page's own address: nothing is loaded from it
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif (tag, name) in LOADED and value:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href") and value:
                self.linked.append(value)


def is_elsewhere(address: str) -> bool:
    """Returns whether an address names another host."""
    return bool(urlsplit(address).netloc) or address.startswith("//")


def problems(site: Path) -> Iterator[str]:
    """Yields a line for each address that is wrong."""
    texts = {p.resolve(): p.read_text() for p in sorted(site.rglob("*.html"))}
    pages = {p: Document(text) for p, text in texts.items()}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        yield from (f"{name} loads {x}" for x in page.loaded if is_elsewhere(x))
        yield from (f"{name} has {x}" for x in ASKING if x in texts[path])
        if path.name == "404.html":
            continue  # its links start at the root of a server
        for address in page.linked + page.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{name} links to {address}, which is not there"
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                yield f"{name} links to {address}, whose anchor is not there"
    for style in sorted(site.rglob("*.css")):
        for address in re.findall(r"url\(\s*['\"]?([^'\")]+)", style.read_text()):
            name = style.relative_to(site)
            if address.startswith("data:"):
                continue
            if is_elsewhere(address):
                yield f"{name} loads {address}"
            elif not (style.parent / address.split("#")[0].split("?")[0]).exists():
                yield f"{name} loads {address}, which is not there"


def main() -> None:
    """Prints the problems; the status is 1 if there is one."""
    site = Path(sys.argv[1])
    if not (site / "index.html").exists():
        sys.exit(f"{site} has no index.html: build the site first (make docs)")
    found = list(problems(site))
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        sys.exit(f"{len(found)} wrong addresses")
    count = len(list(site.rglob("*.html")))
    print(f"{count} pages: links and anchors lead somewhere, nothing is from elsewhere")


if __name__ == "__main__":
    main()
