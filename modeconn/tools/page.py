"""Interactive figures in one HTML file without network: the plotting library of the browser lies in it, packed."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from modeconn.tools.json_files import to_plain

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.figure { width: 100%; height: 34rem; }
.caption { font-size: 0.9rem; opacity: 0.8; }
"""
_START = """
(async () => {
  const packed = document.getElementById("library").textContent;
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  (0, eval)(await new Response(stream).text());
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  for (const place of document.querySelectorAll(".figure")) {
    const { data, layout } = JSON.parse(place.previousElementSibling.textContent);
    const ink = dark ? "#dddddd" : "#222222";
    Object.assign(layout, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink } });
    await Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false });
  }
  document.body.dataset.ready = "true";
})();
"""


def figure_page(title: str, caption: str, data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    """Return a page with one figure.

    Args:
        title: Of the page.
        caption: Below the figure.
        data: Traces of plotly, as JSON and tensors can hold them.
        layout: Its layout; colours of text and paper are those of the reader's light or dark mode.

    Raises:
        ImportError: If plotly is not installed.
    """
    content = json.dumps(to_plain({"data": list(data), "layout": dict(layout)})).replace("</", "<\\/")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<script type="application/json">{content}</script><div class="figure"></div>
<p class="caption">{html.escape(caption)}</p>
<script type="text/plain" id="library">{_packed_library()}</script><script>{_START}</script>
</body></html>
"""


@cache
def _packed_library() -> str:
    """Return plotly's library for browsers, which is 5 MB as it is, packed and as text: 2 MB."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError("interactive figures need plotly: pip install plotly, or modeconn[html].") from None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
