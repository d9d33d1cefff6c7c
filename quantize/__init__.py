"""quantize: train PyTorch models in less memory, with fewer bits, and ship them small and fast.

Importing it registers the ops ``torch.ops.quantize.*``. ``python -m quantize`` prints what was built and what is missing and why.
"""

import torch as _torch  # noqa: F401  the extension links against it

from . import _C as _C
from .activation.config import ActivationConfig
from .activation.memory_report import MemoryReport, memory_report
from .activation.module import QModule
from .activation.packed import PackedActivations, pack_activations
from .activation.variance_report import VarianceReport, variance_report
from .layers import (
    QAdaptiveAvgPool1d,
    QAdaptiveAvgPool2d,
    QAdaptiveAvgPool3d,
    QAvgPool1d,
    QAvgPool2d,
    QAvgPool3d,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QDropout,
    QGroupNorm,
    QInstanceNorm1d,
    QInstanceNorm2d,
    QInstanceNorm3d,
    QLayerNorm,
    QLeakyReLU,
    QLinear,
    QMaxPool1d,
    QMaxPool2d,
    QMaxPool3d,
    QReLU,
    QReLU6,
    QRMSNorm,
    QSyncBatchNorm,
    QUpsample,
)
from .mixed_precision.allocate import Allocation, allocate
from .mixed_precision.latency import measure_latency
from .mixed_precision.measure import measure_sensitivity
from .mixed_precision.sensitivity import Sensitivity
from .packed.capture import capture
from .packed.convert import convert
from .packed.file import load, save
from .packed.modules import (
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedLinear,
)
from .packed.size_report import SizeReport, size_report
from .packed.summary import Summary, summary
from .weight.batch_norm import reestimate_batch_norm
from .weight.binary import binary
from .weight.bit_parameters import add_bit_parameters
from .weight.config import XNOR, DiffQ, DoReFa, PowerOfTwo, Ternary, Uniform
from .weight.dorefa import dorefa_activation, dorefa_weight
from .weight.learned_activation import activation_penalty
from .weight.power_of_two import power_of_two
from .weight.prepare import calibrate, prepare, weight_bits
from .weight.size_penalty import size_penalty
from .weight.ternary import ternary

__version__ = _C.build_info()["version"]

__all__ = [
    "ActivationConfig",
    "Allocation",
    "DiffQ",
    "DoReFa",
    "MemoryReport",
    "PackedActivations",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedLinear",
    "PowerOfTwo",
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
    "QModule",
    "QRMSNorm",
    "QReLU",
    "QReLU6",
    "QSyncBatchNorm",
    "QUpsample",
    "Sensitivity",
    "SizeReport",
    "Summary",
    "Ternary",
    "Uniform",
    "VarianceReport",
    "XNOR",
    "activation_penalty",
    "add_bit_parameters",
    "allocate",
    "binary",
    "calibrate",
    "capture",
    "convert",
    "dorefa_activation",
    "dorefa_weight",
    "load",
    "measure_latency",
    "measure_sensitivity",
    "memory_report",
    "pack_activations",
    "power_of_two",
    "prepare",
    "reestimate_batch_norm",
    "save",
    "size_penalty",
    "size_report",
    "summary",
    "ternary",
    "variance_report",
    "weight_bits",
]
