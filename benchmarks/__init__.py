"""Measurements: `python -m benchmarks NAME [options]`."""

import logging
import os

# bitsandbytes warns at import that it lacks an optional package whose kernels come from the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# torch's profiler otherwise tells stderr when it starts and stops; it looks here when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
