"""What the site has beside the pages in ``docs``: README, CONTRIBUTING, CHANGELOG, the reproductions, and the API."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedkd", "strategies", "plots", "sims")
"""Whose docstrings are the API reference; the clients' halves of methods are no interface for others."""

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        f"sims/{path.parent.name}/README.md": f"reproductions/{path.parent.name}.md"
        for path in ROOT.glob("sims/*/README.md")
    },
}
"""Pages that stand elsewhere in the project, and where the site has them."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")


def on_config(config: Any) -> Any:
    """Put the pages that match a pattern of the navigation in its place."""
    docs = Path(config.docs_dir)
    there = sorted([path.relative_to(docs).as_posix() for path in docs.rglob("*.md")] + [*OUTSIDE.values(), *_api()])
    named = {page for entry in config.nav for page in entry.values()}
    for entry in config.nav:
        for title, page in entry.items():
            if "*" in page:
                entry[title] = [
                    other
                    for other in there
                    if posixpath.dirname(other) == posixpath.dirname(page) and other not in named
                ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs``."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, text in _api().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point relative links at where the site has a page; what is no page of it keeps its text alone."""
    mine = page.file.src_uri
    source = next((source for source, target in OUTSIDE.items() if target == mine), f"docs/{mine}")

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        where = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = OUTSIDE.get(where, where.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            if not (ROOT / where).exists():
                raise FileNotFoundError(f"{source} links to {target}, which is not there")
            return text
        relative = posixpath.relpath(there, posixpath.dirname(mine) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of cross-references in docstrings; the name that follows says enough."""
    return ROLE.sub("", html)


def _api() -> dict[str, str]:
    """Return a page per package and per folder in it, with every public module."""
    pages = {}
    for package in PACKAGES:
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            name = folder.relative_to(ROOT).as_posix().replace("/", ".")
            modules = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
            blocks = [f"::: {name}\n    options:\n      members: false\n" if (folder / "__init__.py").exists() else ""]
            blocks += [f"::: {name}.{module}\n" for module in modules]
            pages[f"api/{name}.md"] = f"# {name}\n\n" + "\n".join(blocks)
    return pages
