"""One thread for the whole suite: tiny models are slower on several, and sums then round equally everywhere."""

import torch

torch.set_num_threads(1)
