"""Count the flops of matrix products, which the compiler writes as dots, convolutions or library calls."""

import math
import re

from .hlo import Array, Computation, Instruction, leaves

_FLASH = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
"""Number of products [T, S] x [S, H] in flash attention; its backward recomputes the scores.

Dao et al. 2022, "FlashAttention", algorithms 1 and 4.
"""

_GEMM = ("__cublas$", "__onednn$matmul", "__triton_gemm")
# Library call: places of the convolution's output and kernel among first operand, second operand and result.
_CONVOLUTIONS = {
    "__cudnn$convForward": (2, 1),
    "__cudnn$convBiasActivationForward": (2, 1),
    "__cudnn$convBackwardInput": (0, 1),
    "__cudnn$convBackwardFilter": (1, 2),
}


def matrix_flops(instruction: Instruction, computation: Computation) -> int:
    """Return the flops of one execution of an instruction on matrix units: 2 per multiply-add, 0 without a product."""
    opcode = instruction.opcode
    if opcode in ("dot", "ragged-dot", "scaled-dot"):
        return _dot(instruction, computation, instruction.numbers("lhs_contracting_dims"))
    if opcode == "convolution":
        return _convolution(instruction, computation, output=2, kernel=1)
    return _library_flops(instruction, computation) if opcode == "custom-call" else 0


def _library_flops(instruction: Instruction, computation: Computation) -> int:
    """Return the flops of a library call, 0 if its target is not one of the known products."""
    target = instruction.text("custom_call_target")
    if target in _CONVOLUTIONS:
        output, kernel = _CONVOLUTIONS[target]
        return _convolution(instruction, computation, output=output, kernel=kernel)
    if target in _FLASH:
        return _FLASH[target] * _flash_product(instruction, computation)
    if not target.startswith(_GEMM):
        return 0
    if found := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes):
        return _dot(instruction, computation, tuple(map(int, re.findall(r"\d+", found[1]))))
    return _guess_dot(instruction, computation)


def _flash_product(instruction: Instruction, computation: Computation) -> int:
    """Return the flops of one product of flash attention without masked scores: half if causal, less with a window."""
    head_size = _operand(instruction, computation, 0).dims[-1]
    found = re.search(
        r'"intermediate_tensor_shape":\s*{"element_type":\s*"\w+",\s*"dimensions":\s*\[([^\]]*)\]',
        instruction.attributes,
    )
    if found is None:
        return 0
    *batch, queries, keys = map(int, re.findall(r"\d+", found[1]))
    pairs = queries * keys
    if re.search(r'"mask_type":\s*"(PADDING_)?CAUSAL"', instruction.attributes):
        # Query q sees min(q + 1, window) keys, about half of all pairs without a window. 4 queries with a window of 2:
        # 1 + 2 + 2 + 2 = 7 = 2 x 4 - 2 x 1 / 2.
        window = re.search(r'"sliding_window_length":\s*"?(\d+)', instruction.attributes)
        seen = int(window[1]) if window and int(window[1]) else keys
        pairs = pairs // 2 if seen >= keys else seen * queries - seen * (seen - 1) // 2
    return 2 * math.prod(batch) * pairs * head_size


def matrix_dtype(instruction: Instruction, computation: Computation) -> str:
    """Return the element type of the first operand, on which the speed of matrix units depends."""
    return next((leaf.dtype for type_ in computation.operand_types(instruction) for leaf in leaves(type_)), "f32")


def _dot(instruction: Instruction, computation: Computation, contracting: tuple[int, ...]) -> int:
    left = _operand(instruction, computation, 0)
    return 2 * _result(instruction).num_elements * math.prod(left.dims[dim] for dim in contracting)


def _guess_dot(instruction: Instruction, computation: Computation) -> int:
    """Return the flops of a product [..., m, k] x [..., k, n] in any order of dimensions.

    A library call need not say which dimension is contracted. Its size follows from the numbers of elements: with a
    batch of b, left x right / (result x b) = bmk x bkn / (bmn x b) = k squared.
    """
    left, right, result = (
        _operand(instruction, computation, 0),
        _operand(instruction, computation, 1),
        _result(instruction),
    )
    batch = math.prod(result.dims[:-2])
    squared = left.num_elements * right.num_elements // (result.num_elements * batch)
    return 2 * result.num_elements * math.isqrt(squared)


def _convolution(instruction: Instruction, computation: Computation, *, output: int, kernel: int) -> int:
    """Return the flops of a convolution: each output element uses every kernel element of its feature."""
    arrays = [_operand(instruction, computation, 0), _operand(instruction, computation, 1), _result(instruction)]
    # `dim_labels=b01f_01io->b01f`: input, kernel and output; `o` is the kernel's dimension of output features.
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    features = arrays[kernel].dims[labels[1].index("o")] if labels else 1
    return 2 * arrays[output].num_elements * arrays[kernel].num_elements // features


def _operand(instruction: Instruction, computation: Computation, index: int) -> Array:
    return next(leaves(computation.operand_types(instruction)[index]))


def _result(instruction: Instruction) -> Array:
    """Return the type of the result; a library call also returns its workspace, after the result."""
    return next(leaves(instruction.type))
