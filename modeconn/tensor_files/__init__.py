"""Files of models of any size, tensor by tensor: read when asked for, written shard by shard."""

from modeconn.tensor_files.arithmetic import interpolate
from modeconn.tensor_files.combining import MergedFiles, TaskFiles, add_task, average, merge, window
from modeconn.tensor_files.difference import Difference, difference
from modeconn.tensor_files.planning import Plan, plan
from modeconn.tensor_files.proof import Verdict, verify
from modeconn.tensor_files.reading import Entry, TensorFiles, made_by
from modeconn.tensor_files.relabelling import AlignedFiles, ShuffledFiles, align, shuffle
from modeconn.tensor_files.writing import write

__all__ = [
    "AlignedFiles", "Difference", "Entry", "MergedFiles", "Plan", "ShuffledFiles", "TaskFiles", "TensorFiles",
    "Verdict", "add_task", "align", "average", "difference", "interpolate", "made_by", "merge", "plan", "shuffle",
    "verify", "window", "write",
]  # fmt: skip
