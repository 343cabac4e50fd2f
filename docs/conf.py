"""The documentation as a site, by Sphinx: `make docs`. The pages are those that stand here, readable as they are.

The source is the repository's root, since pages link to the README, to examples and to configurations. What is in the
navigation and in which order stands in NAVIGATION; a page that does not exist yet is passed over, and one that stands
in `docs/` and is not named comes under "More".
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

NAVIGATION = {
    "Start": ["docs/quickstart", "docs/frameworks", "docs/advise", "docs/plan"],
    "Use": ["docs/configuration", "docs/api", "docs/trackers", "docs/engines", "docs/flower", "docs/errors"],
    "Across machines": ["docs/deploy"],
    "Extend": ["docs/extending", "docs/design", "CONTRIBUTING"],
    "Evidence": ["docs/results", "docs/log"],
    "More": ["CHANGELOG", "src/fedtrio/models/nano/README", "src/fedtrio/data/demo/README"],
}

project = "fedtrio"
author = copyright = "The fedtrio maintainers"
extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "docs/**.md", "src/**/README.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "benchmarks", "node_modules"]
myst_heading_anchors = 4  # as GitHub makes them
highlight_language = "none"  # of blocks that name no language: commands and their output
html_theme = "furo"
html_title = "fedtrio"
html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "native"


def navigation() -> dict[str, list[str]]:
    """The pages that there are."""
    found = {part: [p for p in pages if (ROOT / f"{p}.md").is_file()] for part, pages in NAVIGATION.items()}
    named = {page for pages in found.values() for page in pages}
    found["More"] += sorted({f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} - named)
    return found


def add_navigation(app: Any, docname: str, source: list[str]) -> None:
    """To the front page alone, and so that GitHub sees none of it."""
    if docname == root_doc:
        for caption, pages in navigation().items():
            lines = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def plain_folders(app: Any, docname: str, source: list[str]) -> None:
    """A link to a folder of the repository leads nowhere on a site: its words stay."""
    here = Path(app.env.doc2path(docname)).parent

    def words(link: re.Match[str]) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)\)", words, source[0])


def add_index(app: Any, error: Exception | None) -> None:
    """The front page under the name that servers look for."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", add_navigation)
    app.connect("source-read", plain_folders)
    app.connect("build-finished", add_index)
