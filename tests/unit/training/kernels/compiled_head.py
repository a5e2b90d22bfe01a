"""Compiles the head's Triton kernels, which needs no GPU, and prints the compute capabilities that it did it for."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raylign.training.kernels import head_triton

_SUMS = dict.fromkeys(("highest", "label", "total", "expected", "squares", "plain"), "*fp32")
_ROWS = dict.fromkeys(("log_z", "of_logps", "of_entropies", "entropies"), "*fp32")
_KERNELS = {head_triton.fold_kernel: _SUMS, head_triton.gradient_kernel: _ROWS}


def compile_all(capability: int) -> None:
    """To machine code, for logits in bfloat16 and float32."""
    for kernel, others in _KERNELS.items():
        for dtype in ("*bf16", "*fp32"):
            types = {"logits": dtype, "own": "*i64", **others, "columns": "i32", "BLOCK": "constexpr"}
            source = ASTSource(kernel, types, {"BLOCK": head_triton._BLOCK})
            options = {"num_warps": head_triton._WARPS}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert made.asm["cubin"]


if __name__ == "__main__":
    for number in (80, 90, 100):
        compile_all(number)
        print(number)
