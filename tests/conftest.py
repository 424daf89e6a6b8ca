"""What several test files need."""

import os

# Before transformers is imported anywhere: the reference models are local, and no test may wait for
# the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels run in NumPy.
    os.environ["TRITON_INTERPRET"] = "1"

from scripts import download, machine  # noqa: E402

# Files that take longest, of few tests and of many: begun last, one of them would run alone.
# pytest-xdist, if it is there, would begin with those of most tests.
LONG = (
    "deterministic tp download codegen speculation changes published triton families_exact".split()
)


def pytest_configure(config):
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """One thread, before the first fixture is made: tiny products gain nothing from a second one,
    and all wait long for it where the machine is shared, by five times for the default model."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch, request):
    """To measure it takes longer than most runs here. Those that are processes do measure it."""

    def read_bandwidth(device):
        return 12e9

    if "bandwidth" not in request.node.name:
        monkeypatch.setattr(machine, "read_bandwidth", read_bandwidth)


@pytest.fixture(scope="session")
def default_checkpoint():
    """The directory of the default model, fetched when it is not there yet."""
    download.fetch()
    return download.DEFAULT
