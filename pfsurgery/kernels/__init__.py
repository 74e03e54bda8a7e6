"""How the parameter-free operations run at the speed of memory.

Numba on the CPU and Triton on the GPU, in eager mode; wherever someone traces, compiles or exports,
or a library is missing, the stock ATen calls. `choice.py` decides, and `explain` says what it
decides for an input. The environment variable `PFSURGERY_KERNELS=0` and the context manager
`disabled` switch the kernels off.
"""

from pfsurgery.kernels.choice import disabled, explain

__all__ = ["disabled", "explain"]
