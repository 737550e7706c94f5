"""Files of models of any size, tensor by tensor: read when asked for, written shard by shard."""

from modeconn.tensor_files.arithmetic import interpolate
from modeconn.tensor_files.difference import Difference, difference
from modeconn.tensor_files.reading import Entry, TensorFiles, made_by
from modeconn.tensor_files.relabelling import AlignedFiles, ShuffledFiles, align, shuffle
from modeconn.tensor_files.writing import write

__all__ = [
    "AlignedFiles", "Difference", "Entry", "ShuffledFiles", "TensorFiles", "align", "difference", "interpolate",
    "made_by", "shuffle", "write",
]  # fmt: skip
