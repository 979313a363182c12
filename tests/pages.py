"""Reading a page as a browser's parser does."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input", "img", "br"}  # elements that have no end tag


class Tags(HTMLParser):
    """Holds every tag to be closed in its place; `seen`: all that were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag
