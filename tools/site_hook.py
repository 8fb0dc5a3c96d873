"""What the site does beyond MkDocs: pages and links from outside of `docs/`.

On GitHub the pages of `docs/` link to files such as `../benchmarks/README.md`. On the
site such a link leads to the repository; an image is copied into the site instead. Some
files from elsewhere are pages of the site themselves; see `PAGES`.
"""

import base64
import json
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site, and the files elsewhere in the repository that they are made from.
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
}
PAGES |= {
    f"notebooks/{x.stem}.md": f"notebooks/{x.name}" for x in ROOT.glob("*/*.ipynb")
}
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")


def on_config(config: MkDocsConfig) -> None:
    """Reads where the repository is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.extra["repository"] = project["urls"]["Repository"]
    # The header links to it: theme/partials/source.html.
    config.repo_url = config.extra["repository"]
    config.repo_name = "Repository"
    config.edit_uri = None


@event_priority(100)  # before the plugins, which are to see these files
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages from elsewhere, and the images that pages show from elsewhere."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".ipynb"):
            text = from_notebook(text, page.removesuffix(".md"), files, config)
        files.append(File.generated(config, page, content=text))
    for file in files.documentation_pages():
        for link in LINK.findall(file.content_string):
            image = source_of(file.src_uri, link)
            path, known = ROOT / image, files.get_file_from_path(site_path(image))
            if path.suffix in (".png", ".svg") and path.exists() and not known:
                files.append(File.generated(config, image, abs_src_path=str(path)))


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns links to what is elsewhere in the repository."""
    here = page.file.src_uri

    def turned(link: re.Match[str]) -> str:
        source = source_of(here, link[1])
        target = site_path(source)
        if files.get_file_from_path(target) is not None:
            return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"
        if not (ROOT / source).exists():
            return link[0]  # MkDocs warns, but for the pictures of notebooks
        return f"]({config.extra['repository']}/blob/main/{source}"

    return LINK.sub(turned, markdown)


def source_of(page: str, link: str) -> str:
    """Returns the path in the repository that a link of a page leads to."""
    folder = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def site_path(source: str) -> str:
    """Returns the path on the site of a file of the repository."""
    pages = {source: page for page, source in PAGES.items()}
    return pages.get(source, source.removeprefix("docs/"))


def from_notebook(text: str, name: str, files: Files, config: MkDocsConfig) -> str:
    """Returns a notebook as Markdown, with its stored output; adds its pictures."""
    # Its code would crowd out the pages of words in the search.
    parts = ["---\nsearch:\n  boost: 0.2\n---"]
    for cell in json.loads(text)["cells"]:
        content = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        parts.append(f"```python\n{content}\n```" if code else content)
        for output in cell.get("outputs", ()):
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(parts)}.png"
                png = base64.b64decode(data["image/png"])
                files.append(File.generated(config, picture, content=png))
                parts.append(f"![Output]({posixpath.basename(picture)})")
            else:
                shown = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{shown.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
