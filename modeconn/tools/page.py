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
.caption, .made { font-size: 0.9rem; opacity: 0.8; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 0.15rem 0.8rem 0.15rem 0; text-align: right; white-space: nowrap; }
img { max-width: 100%; }
.pictures { display: flex; flex-wrap: wrap; gap: 0.7rem; align-items: flex-start; }
.pictures img { width: 27rem; }
pre { overflow-x: auto; font-size: 0.85rem; }
@media print { .figure { break-inside: avoid; } .pictures img { break-inside: avoid; width: 48%; }
  .wide, pre { overflow: visible; } td, th { white-space: normal; }
  pre { white-space: pre-wrap; font-size: 0.55rem; } table { font-size: 0.72rem; } }
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
    const bar = innerWidth < 700 ? false : "hover"; // on phones it would cover the menu
    await Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false, displayModeBar: bar });
  }
  document.body.dataset.ready = "true";
})();
"""


def figure(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    """Return the place of an interactive figure in a `page`.

    Args:
        traces: Of plotly, as JSON and tensors can hold them.
        layout: Its layout; the colours of text and paper are the reader's.
    """
    content = json.dumps(to_plain({"data": list(traces), "layout": dict(layout)})).replace("</", "<\\/")
    return f'<script type="application/json">{content}</script><div class="figure"></div>'


def page(title: str, body: str, *, interactive: bool) -> str:
    """Return a page of HTML that needs no network, light or dark as its reader likes, for screens, phones and paper.

    Args:
        title: Of the page.
        body: What stands below the title, as HTML.
        interactive: Whether figures are in it, which need the library.
    """
    library = f'<script type="text/plain" id="library">{_packed_library()}</script>' if interactive else ""
    start = f"<script>{_START}</script>" if interactive else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
{library}{start}
</body></html>
"""


def figure_page(title: str, caption: str, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    """Return a page with one figure and its caption."""
    body = f'{figure(traces, layout)}\n<p class="caption">{html.escape(caption)}</p>'
    return page(title, body, interactive=True)


@cache
def _packed_library() -> str:
    """Return plotly's library for browsers, which is 5 MB as it is, packed and as text: 2 MB."""
    from plotly.offline import get_plotlyjs  # takes a moment, and only pages need it

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
