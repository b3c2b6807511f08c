"""Sphinx's settings for the site that `make docs` builds from the pages of this folder. It needs no network.

The pages are Markdown as GitHub shows it. Nothing in them belongs to Sphinx: the list of contents below is added to
`index.md` when it is read. A page that is not in the list appears under "More".
"""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = html_title = "titan_distill"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # links to headings are checked, too
html_theme = "furo"
html_show_copyright = False
suppress_warnings = ["misc.highlighting_failure"]  # of mermaid diagrams, which stay text here

CONTENTS = {
    "Start": ["first_run", "tasks", "start_to_finish", "install", "troubleshooting"],
    "Train": ["data", "layouts", "multi_node", "checkpoints", "memory_and_profiling", "float8_and_compile",
              "sparse_attention", "environment_variables"],
    "Judge and use": ["metrics", "doctor", "evaluation", "using_the_student"],
    "Recipes": ["recipes/README", "recipes/*"],
    "Understand and extend": ["architecture", "extending", "algorithms", "parity", "kernels", "performance"],
    "More": ["**"],
}  # fmt: skip
"""Pages by caption, as patterns of names without suffix. A page goes to the first one that matches."""


def contents(folder: Path) -> str:
    """Returns the list of contents of all pages in a folder, in Sphinx's syntax."""
    listed = {"index"}
    blocks = []
    for caption, patterns in CONTENTS.items():
        pages = [
            page
            for pattern in patterns
            for path in sorted(folder.glob(f"{pattern}/*.md" if pattern == "**" else f"{pattern}.md"))
            if (page := path.relative_to(folder).with_suffix("").as_posix()) not in listed and not listed.add(page)
        ]
        if pages:
            blocks.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n".join(blocks)


def setup(app: Sphinx) -> None:
    def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
        if page == "index":
            source[0] += f"\n\n{contents(Path(app.srcdir))}\n"

    def wrap_commands(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object) -> None:
        context["metatags"] = context.get("metatags", "") + "<style>pre { white-space: pre-wrap }</style>"

    app.connect("source-read", add_contents)
    app.connect("html-page-context", wrap_commands)
