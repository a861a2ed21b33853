"""Shared by all tests; being here also makes `tests/tiny_models.py` and `tests/fused_models.py` importable from every folder below."""

import torch

# The tests' matrices are small: a second thread costs more in waiting than it brings, many times more on a busy machine.
torch.set_num_threads(1)
