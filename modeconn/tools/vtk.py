"""Values on a grid as VTK image data, the XML that ParaView and its library read."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np


def image_data(values: Mapping[str, np.ndarray[Any, Any]], origin: Sequence[float], spacing: Sequence[float]) -> str:
    """Return a ``.vti`` file as text.

    Args:
        values: By name, float64 ``(rows, columns)``.
        origin: Coordinates x and y of the first column and row.
        spacing: Between columns, and between rows.
    """
    rows, columns = next(iter(values.values())).shape
    extent = f"0 {columns - 1} 0 {rows - 1} 0 0"
    place = f'Origin="{origin[0]!r} {origin[1]!r} 0" Spacing="{spacing[0]!r} {spacing[1]!r} 1"'
    arrays = [
        f'<DataArray type="Float64" Name={quoteattr(name)} format="binary">{_packed(value)}</DataArray>'
        for name, value in values.items()
    ]
    lines = [
        '<?xml version="1.0"?>',
        '<VTKFile type="ImageData" version="1.0" byte_order="LittleEndian" header_type="UInt64">',
        f'<ImageData WholeExtent="{extent}" {place}>',
        f'<Piece Extent="{extent}"><PointData Scalars={quoteattr(next(iter(values)))}>',
        *arrays,
        "</PointData></Piece></ImageData></VTKFile>",
    ]
    return "\n".join(lines) + "\n"


def _packed(value: np.ndarray[Any, Any]) -> str:
    """Return an array as text in base 64, after the number of its bytes: columns vary fastest."""
    content = np.ascontiguousarray(value, dtype="<f8").tobytes()
    return base64.b64encode(len(content).to_bytes(8, "little") + content).decode()
