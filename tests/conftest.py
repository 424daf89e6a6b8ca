"""What several test files need."""

import os

# Before transformers is imported anywhere: the reference models are local, and no test may wait for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: without a GPU its kernels run in NumPy

from scripts import download  # noqa: E402


@pytest.fixture(scope="session")
def default_checkpoint():
    """The directory of the default model, fetched when it is not there yet."""
    download.fetch()
    return download.DEFAULT


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny products gain nothing from a second thread, and wait long for it where the machine is shared."""
    threads = torch.get_num_threads()
    if "default_checkpoint" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
