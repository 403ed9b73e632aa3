"""The C library of this process, for the calls that Python has no word for."""

from __future__ import annotations

import ctypes

libc = ctypes.CDLL(None)
