"""A sensitivity of two layers and three choices, whose numbers count up."""

import torch

from quantize import Sensitivity

LAYERS, CHOICES = ("conv", "fc"), [(2, None), (4, 8), (None, None)]


def sensitivity(matrix=None, layers=LAYERS, choices=CHOICES, **more):
    size = len(layers) * len(choices)
    matrix = torch.arange(size * size).view(size, size).double() if matrix is None else matrix
    table = torch.arange(size).view(len(layers), len(choices))
    return Sensitivity(layers, choices, matrix, 10 * table, 100 * table, **more)
