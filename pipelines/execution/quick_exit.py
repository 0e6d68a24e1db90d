"""An import of this module makes its process end without tearing PyTorch down, which takes seconds.

The process that forks those of a pool imports it.
"""

from __future__ import annotations

import atexit
import os

atexit.register(os._exit, 0)
