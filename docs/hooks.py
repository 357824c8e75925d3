"""What mkdocs does to a page: links to files outside docs/ become plain text.

On the web, the repository's other files are not part of the site. A link to a file that does not
exist is left as it is, so that `mkdocs build --strict` refuses it. What the tour writes behind the
language of a block of code would make mkdocs overlook the block, so it is removed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
FENCE = re.compile(r"^(```\w+) .+$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """The page's Markdown, as mkdocs takes it."""
    folder = (DOCS / page.file.src_path).parent

    def text_of(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        outside = target.exists() and not target.is_relative_to(DOCS)
        return link[1] if outside else link[0]

    return LINK.sub(text_of, FENCE.sub(r"\1", markdown))
