"""For mkdocs: pages link to files of the repository, which are no pages; on the site those links become paths."""

import re


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", _path, markdown)


def _path(link: re.Match) -> str:
    text, path = link.groups()
    return text if path in text.strip("`") else f"{text} (`{path}`)"
