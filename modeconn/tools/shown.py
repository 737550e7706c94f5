"""How objects show themselves in notebooks: their name, and a table of what they hold."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

from modeconn.tools.door import shortened
from modeconn.tools.provenance import text_of
from modeconn.tools.table import html_table

_LONGEST = 120


class Shown:
    """An object that notebooks show as a table: of a data class its fields, of anything else its text.

    A class that has more to say overrides `_facts`. Colours are those of the notebook, light or dark.
    """

    def _facts(self) -> Mapping[str, str]:
        """Return what the table holds, by name; nothing if the text of the object says it better."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: shortened(text_of(getattr(self, f.name)), _LONGEST) for f in dataclasses.fields(self) if f.repr}

    def _repr_html_(self) -> str:
        facts = self._facts()
        if not facts:
            return f"<pre>{html.escape(repr(self))}</pre>"
        return f"<p><b>{type(self).__name__}</b></p>{facts_table(facts)}"


def facts_table(facts: Mapping[str, Any]) -> str:
    """Return names and texts as a table, both columns to the left.

    Example:
        >>> facts_table({"curve": "Line()"}).count("text-align: left")
        2
    """
    return html_table(None, [[name, str(value)] for name, value in facts.items()], left=(0, 1))
