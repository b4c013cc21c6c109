"""Measurements: `python -m benchmarks NAME [options]`."""

import logging

# bitsandbytes warns at import that it lacks an optional package whose kernels come from the network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
