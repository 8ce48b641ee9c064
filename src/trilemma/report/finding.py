"""One paragraph of the answer."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One paragraph of the answer.

    Attributes:
        topic: What it is about, a few words.
        sentences: One per comparison.
        caution: True where it limits what the other paragraphs mean.
    """

    topic: str
    sentences: tuple[str, ...]
    caution: bool = False

    @property
    def text(self) -> str:
        """Returns the paragraph."""
        return " ".join(self.sentences)
