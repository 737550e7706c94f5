"""Tests that run side by side share the cores: one thread each, also in the processes that they start.

``pytest --device cuda`` makes the networks and data of `tests.cases` on that device; default: the CPU.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is later


def pytest_addoption(parser):
    """Add ``--device``."""
    parser.addoption("--device", default="cpu", help="where the tests' networks and data are made, such as cuda")


def pytest_configure(config):
    """Tell `tests.cases`, also in the processes that tests start."""
    os.environ["MODECONN_TEST_DEVICE"] = config.getoption("--device")


@pytest.fixture(scope="module", autouse=True)
def _exports_forgotten():
    """Empty torch's cache of exported operators after each module: it only grows, and slows all later tests down."""
    yield
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.cache_clear()


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """Return processes that run functions of tests as one group, see `tests.pool`."""
    from tests.pool import Pool

    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()
