"""The edge: command line, daemon, status and the demonstration; nothing imports it."""

import os

# Nothing here multiplies matrices: without this NumPy's BLAS starts a thread for each processor,
# and they spin while the process starts.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
