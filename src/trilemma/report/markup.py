"""HTML from nested values: every plain string is escaped, so a study's names cannot become markup."""

import html
import re
from collections.abc import Iterable


class Html(str):
    """Text that is markup already and is not escaped again."""


#: What an element may hold; None holds nothing.
Content = str | Iterable["Content"] | None

_EMPTY = {"meta", "img", "br", "hr", "col"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


def clean(text: str) -> str:
    """Returns text without the control characters that neither HTML, LaTeX, CSV nor a terminal should meet."""
    return _UNPRINTABLE.sub("\ufffd", text)


def render(content: Content) -> Html:
    """Returns content as markup, plain strings escaped."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(clean(content)))
    return Html("".join(render(part) for part in content))


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Html:
    """Returns an element.

    Args:
        name: Of the element, such as "td".
        *content: What it holds.
        **attributes: `class_` is `class`, and `data_value` is `data-value`; None and False leave one out, True writes
            it without a value.
    """
    written = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{html.escape(clean(str(value)))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _EMPTY:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{render(content)}</{name}>")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
