"""Threads that wait sleep instead of spinning, and most tests have only one.

The models of the tests are tiny: on busy cores, OpenMP's threads would spin for nine tenths of the
time. It has to be said before torch is imported; processes that tests start inherit it. And waking
a second thread takes longer than what it would do. What is compiled is compiled for all threads:
those tests say "compil" in their names.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(THREADS if "compil" in request.node.name else 1)
