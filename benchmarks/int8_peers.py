"""int8 layers of other libraries, float in and float out: PyTorch's own, and onnxruntime and OpenVINO where they are installed
(pip install onnx onnxruntime openvino)."""

import io

import torch
from torch import nn

INPUT_SCALE, INPUT_ZERO, WEIGHT_SCALE, OUTPUT_SCALE, OUTPUT_ZERO = 0.04, 128, 0.02, 0.25, 128


def pytorch_int8(layer: nn.Module, x: torch.Tensor):
    """A function that runs `layer` (Conv2d or Linear) by torch.ops.quantized: quantize, multiply, dequantize."""
    weight = torch.quantize_per_channel(
        layer.weight.detach(),
        torch.full((len(layer.weight),), WEIGHT_SCALE),
        torch.zeros(len(layer.weight), dtype=torch.int64),
        0,
        torch.qint8,
    )
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        packed = torch.ops.quantized.linear_prepack(weight, bias)
        run = torch.ops.quantized.linear
    else:
        packed = torch.ops.quantized.conv2d_prepack(weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        run = torch.ops.quantized.conv2d

    def call():
        codes = torch.quantize_per_tensor(x, INPUT_SCALE, INPUT_ZERO, torch.quint8)
        return run(codes, packed, OUTPUT_SCALE, OUTPUT_ZERO).dequantize()

    return call


def onnx_int8(layer: nn.Module, x: torch.Tensor) -> bytes:
    """An ONNX model of `layer` between QuantizeLinear and DequantizeLinear, which runtimes fuse into an int8 layer."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = (layer.weight.detach() / WEIGHT_SCALE).round().clamp(-127, 127).to(torch.int8).numpy()
    constants = {
        "w": weight,
        "ws": np.full(len(weight), WEIGHT_SCALE, np.float32),
        "wz": np.zeros(len(weight), np.int8),
        "xs": np.float32(INPUT_SCALE),
        "xz": np.uint8(INPUT_ZERO),
        "ys": np.float32(OUTPUT_SCALE),
        "yz": np.uint8(OUTPUT_ZERO),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
    ]
    if isinstance(layer, nn.Linear):
        nodes.append(helper.make_node("Gemm", ["xd", "wd"], ["y"], transB=1))
    else:
        pads = [*layer.padding, *layer.padding]
        attributes = {"strides": layer.stride, "pads": pads, "dilations": layer.dilation, "group": layer.groups}
        nodes.append(helper.make_node("Conv", ["xd", "wd"], ["y"], **attributes))
    nodes += [
        helper.make_node("QuantizeLinear", ["y", "ys", "yz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, list(layer(x).shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    stream = io.BytesIO()
    onnx.save(model, stream)
    return stream.getvalue()


def by_onnxruntime(model: bytes, x: torch.Tensor, threads: int):
    """A function that runs an ONNX model by onnxruntime; ImportError where it is not installed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def by_openvino(model: bytes, x: torch.Tensor, threads: int):
    """The same by OpenVINO."""
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(core.read_model(model), "CPU", hints).create_infer_request()
    array = x.numpy()
    return lambda: request.infer({"x": array})


RUNTIMES = {"onnxruntime int8": by_onnxruntime, "OpenVINO int8": by_openvino}


def runtimes(make, module: nn.Module, x: torch.Tensor, threads: int, names=tuple(RUNTIMES)) -> dict:
    """Name to function of every runtime that is there. `make(module, x)`: the ONNX model that they run."""
    try:
        model = make(module, x)
    except ImportError as missing:
        print(f"int8 of other libraries: not measured, {missing}")
        return {}
    found = {}
    for name in names:
        try:
            found[name] = RUNTIMES[name](model, x, threads)
        except (ImportError, RuntimeError) as missing:  # the latter: a model that it cannot run on this ISA
            print(f"{name}: not measured, {str(missing).splitlines()[0]}")
    return found


def peers(layer: nn.Module, x: torch.Tensor, threads: int) -> dict:
    """Name to function of every library that is there."""
    return {"PyTorch int8": pytorch_int8(layer, x)} | runtimes(onnx_int8, layer, x, threads)
