"""torch.nn's layers with compressed activations."""

from .batch_norm import QBatchNorm1d, QBatchNorm2d, QBatchNorm3d, QSyncBatchNorm
from .conv import QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d
from .linear import QLinear
from .norm import QGroupNorm, QInstanceNorm1d, QInstanceNorm2d, QInstanceNorm3d, QLayerNorm, QRMSNorm
from .pool import (
    QAdaptiveAvgPool1d,
    QAdaptiveAvgPool2d,
    QAdaptiveAvgPool3d,
    QAvgPool1d,
    QAvgPool2d,
    QAvgPool3d,
    QMaxPool1d,
    QMaxPool2d,
    QMaxPool3d,
    QUpsample,
)
from .relu import QDropout, QLeakyReLU, QReLU, QReLU6

__all__ = [
    "QAdaptiveAvgPool1d",
    "QAdaptiveAvgPool2d",
    "QAdaptiveAvgPool3d",
    "QAvgPool1d",
    "QAvgPool2d",
    "QAvgPool3d",
    "QBatchNorm1d",
    "QBatchNorm2d",
    "QBatchNorm3d",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QDropout",
    "QGroupNorm",
    "QInstanceNorm1d",
    "QInstanceNorm2d",
    "QInstanceNorm3d",
    "QLayerNorm",
    "QLeakyReLU",
    "QLinear",
    "QMaxPool1d",
    "QMaxPool2d",
    "QMaxPool3d",
    "QRMSNorm",
    "QReLU",
    "QReLU6",
    "QSyncBatchNorm",
    "QUpsample",
]
