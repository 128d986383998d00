"""Two test workers share two cores: numpy's and scipy's BLAS and torch would each start two threads in each of them. They
read this as they are loaded."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
