"""MkDocs hooks: pages from outside docs/, and links to them.

Files such as CHANGELOG.md are read where they are, and links that work in a checkout (`../benchmarks/RESULTS.md`) are rewritten
to lead to their pages on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ("app", "index", "ray", "starter", "subset", "timm", "transformers", "clap")
#: Pages that are read from elsewhere in the repository.
INCLUDED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
    **{f"plugins/{name}.md": f"plugins/bridgekit-{name}/README.md" for name in PLUGINS},
}
#: The page for a link to a file or folder that is not a page.
STANDS_FOR = {
    ".": "index.md",
    "README.md": "index.md",
    "bridgekit/hookspecs.py": "reference/plugins.md",
    **{path: page for page, path in INCLUDED.items()},
    **{posixpath.dirname(path): page for page, path in INCLUDED.items() if page.startswith("plugins/")},
}
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are read from elsewhere."""
    for page, path in INCLUDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links out of docs/ lead to pages of the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(INCLUDED.get(uri, f"docs/{uri}"))

    def relinked(link: re.Match[str]) -> str:
        title, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if ":" in target or (path.startswith("docs/") and uri not in INCLUDED):
            return link[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{folder}: broken link to {target}")
        to = path.removeprefix("docs/") if path.startswith("docs/") else STANDS_FOR.get(path)
        return f"[{title}]({posixpath.relpath(to, posixpath.dirname(uri) or '.')}{anchor})" if to else title

    parts = [part if part.startswith("```") else _LINK.sub(relinked, part) for part in _FENCE.split(markdown)]
    return "".join(parts)
