"""Threads that wait sleep instead of spinning.

The models of the tests are tiny: on busy cores, OpenMP's threads would spin for nine tenths of the
time. It has to be said before torch is imported; processes that tests start inherit it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
