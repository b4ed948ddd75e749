"""Pages in `docs/` that people write and that results fill in, between two markers."""

from __future__ import annotations

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def fill(page: str, text: str) -> str:
    """Put a text between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs the markers {BEGIN!r} and {END!r}, once each and in this order")
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}"
