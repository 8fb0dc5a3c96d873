"""What the site does beyond MkDocs: pages and links from outside of `docs/`.

On GitHub the pages of `docs/` link to files such as `../benchmarks/README.md`. On the
site such a link leads to the repository. An image is copied into the site instead.
Some files outside of `docs/` are pages of the site themselves; see `PAGES`.
"""

import base64
import json
import os
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that are made from files elsewhere in the repository.
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
}
PAGES |= {
    f"notebooks/{path.stem}.md": f"notebooks/{path.name}"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
IMAGES = {".png", ".svg"}
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Links the repository in the footer.

    It is no `repo_url`: with that the theme would ask another host for stars.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.extra["repository"] = project["urls"]["Repository"]
    config.extra["social"] = [
        {
            "icon": "fontawesome/brands/github",
            "link": config.extra["repository"],
            "name": "Repository",
        }
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from elsewhere, and the images that pages show from elsewhere."""
    for name, path in PAGES.items():
        source = ROOT / path
        text = (
            _from_notebook(source, files, config) if source.suffix == ".ipynb" else ""
        )
        files.append(File.generated(config, name, content=text or source.read_text()))
    for file in files.documentation_pages():
        folder = _folder(file.src_uri)
        for path, _ in LINK.findall(file.content_string):
            image = (folder / path).resolve()
            if image.suffix in IMAGES and not image.is_relative_to(ROOT / "docs"):
                uri = image.relative_to(ROOT).as_posix()
                if files.get_file_from_path(uri) is None and image.exists():
                    files.append(File.generated(config, uri, abs_src_path=str(image)))
    return files


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns links that leave `docs/`."""
    uri_of_page = page.file.src_uri
    folder, here = _folder(uri_of_page), posixpath.dirname(uri_of_page)
    repository = config.extra["repository"]

    def turned(link: re.Match[str]) -> str:
        path, anchor = link.group(1), link.group(2) or ""
        beside = files.get_file_from_path(posixpath.join(here, path))
        if beside is not None and uri_of_page in PAGES:
            return link.group(0)  # a picture of a notebook
        target = (folder / path).resolve()
        if not target.exists():
            return link.group(0)  # MkDocs warns
        uri = target.relative_to(ROOT).as_posix()
        page_of = {source: name for name, source in PAGES.items()}
        on_site = page_of.get(uri)
        if target.is_relative_to(ROOT / "docs"):
            on_site = target.relative_to(ROOT / "docs").as_posix()
        elif target.suffix in IMAGES:
            on_site = uri
        if on_site is not None:
            return f"]({posixpath.relpath(on_site, here or '.')}{anchor})"
        view = "tree" if target.is_dir() else "blob"
        return f"]({repository}/{view}/main/{uri}{anchor})"

    return LINK.sub(turned, markdown)


def _folder(uri: str) -> Path:
    """Returns the folder that links of a page are relative to."""
    source = PAGES.get(uri, os.path.join("docs", uri))
    return (ROOT / source).parent


def _from_notebook(path: Path, files: Files, config: MkDocsConfig) -> str:
    """Returns a notebook as Markdown, with its stored output; adds its pictures."""
    # Its code would crowd out the pages of words in the search.
    parts = ["---\nsearch:\n  boost: 0.2\n---"]
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code" and text:
            parts.append(f"```python\n{text}\n```")
            prefix = f"images/{path.stem}_{number}"
            parts += _outputs(prefix, cell["outputs"], files, config)
    return "\n\n".join(parts) + "\n"


def _outputs(
    prefix: str, outputs: list[dict[str, Any]], files: Files, config: MkDocsConfig
) -> list[str]:
    """Returns the output of one cell, as Markdown."""
    parts = []
    for index, output in enumerate(outputs):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{prefix}_{index}.png"
            content = base64.b64decode(data["image/png"])
            uri = f"notebooks/{name}"
            files.append(File.generated(config, uri, content=content))
            parts.append(f"![Output of the cell above]({name})")
        else:
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            parts.append(f"```text\n{text}\n```" if text else "")
    return parts
