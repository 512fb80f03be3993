"""The ONNX operators that NVIDIA's TensorRT supports, as far as segmentation networks need them."""

from typing import Any

# Source: onnx-tensorrt, docs/operators.md, TensorRT 10.15, operators with "Y", without those for recurrence, sound,
# detection, quantisation and random numbers.
TENSORRT = '10.15'
_NAMES = """
Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
ConvTranspose Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity
InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod
Mul Neg Not Or Pad Pow PRelu Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu
Reshape Resize Round Shape Sigmoid Sign Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile Transpose
Unsqueeze Where
"""
OPERATORS = frozenset(_NAMES.split())
_RESIZE_MODES = 'nearest', 'linear'


def why_not(node: Any) -> str | None:
    """Return why TensorRT refuses a node of an ONNX graph, or None if it does not."""
    if node.domain not in ('', 'ai.onnx'):
        return f'{node.op_type} of {node.domain} is no standard ONNX operator'
    if node.op_type not in OPERATORS:
        return f'{node.op_type} is not supported'
    if node.op_type == 'Resize':
        mode = next((a.s.decode() for a in node.attribute if a.name == 'mode'), 'nearest')
        if mode not in _RESIZE_MODES:
            return f'Resize in mode {mode} is not supported, only {" and ".join(_RESIZE_MODES)}'
    return None
