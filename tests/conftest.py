"""Settings of all tests: one thread, and property tests that draw the same examples every time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tensors are small, and the machine is shared
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("reproducible")
