"""Hook of MkDocs that adds the pages outside docs/ and the notebook to the site.

Links are relative to the file that contains them, as repository browsers expect. On the site, these pages have other paths, so
the hook adapts the links to them and from them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = "docs/quickstart.ipynb"
PAGES = {  # path in the repository: path on the site
    NOTEBOOK: "quickstart.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "scripts/cost_model.md": "cost_model.md",
    "scripts/measure_memory.md": "measure_memory.md",
    "scripts/preflight.md": "preflight.md",
}
SOURCES = {site: source for source, site in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the notebook with its figures."""
    for source, site in PAGES.items():
        if source != NOTEBOOK:
            files.append(File.generated(config, site, abs_src_path=str(REPOSITORY / source)))
    folder = posixpath.splitext(PAGES[NOTEBOOK])[0] + "_files"
    resources = {"output_files_dir": folder, "unique_key": "figure"}
    text, resources = MarkdownExporter().from_filename(str(REPOSITORY / NOTEBOOK), resources=resources)
    files.append(File.generated(config, PAGES[NOTEBOOK], content=text))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Return the text of a page with links to paths on the site."""
    return LINK.sub(lambda match: site_link(match[1], page.file.src_uri), markdown)


def site_link(link: str, page: str) -> str:
    """Return the link on the site for a link in the source of ``page``; links to other files are returned unchanged."""
    source = SOURCES.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if not (REPOSITORY / target).is_file():
        return link
    site = PAGES.get(target) or target.removeprefix("docs/")
    return posixpath.relpath(site, posixpath.dirname(page) or ".")
