"""Tests that run side by side share the cores: one thread each, also in the processes that they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is later
