"""Our kernels: each one name in op, reference, test and benchmark.

The version is fixed: transformers probes for a distribution called `kernels`, and must find that
this folder is not it. Never raise it to follow the project's version.
"""

__version__ = "0.0.0"
