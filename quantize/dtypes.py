"""The floating-point types that the ops take."""

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
