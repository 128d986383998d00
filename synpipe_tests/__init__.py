"""Limits each test process to one computing thread, because two processes share two cores.

The libraries (torch, and the BLAS of numpy and scipy) read the limit when they are imported, so it is set here, before them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
