"""Every test process computes on one thread: they run side by side, and more threads than cores wait for each other."""

import torch

torch.set_num_threads(1)
