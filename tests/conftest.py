"""Every test runs on one torch thread: with networks this small, two only fight for the cores."""

import torch

torch.set_num_threads(1)
