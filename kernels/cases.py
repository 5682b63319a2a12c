"""Every kernel at the shapes that are looked after: one row each.

`make kernel-check` compiles the rows for sm_90a and compares them with their golden rows;
`internjax bench kernels` runs them on a GPU, or predicts their times from the compiled code.
"""

from internjax.kernels.case import Case
from internjax.kernels.gpu.attention_cases import decode_attention_cases
from internjax.kernels.gpu.flash_cases import flash_cases
from internjax.kernels.gpu.fused_cases import fused_cases
from internjax.kernels.gpu.matmul_cases import grouped_cases, matmul_cases

CASES: dict[str, Case] = {}
CASES |= matmul_cases() | decode_attention_cases() | grouped_cases() | fused_cases()
CASES |= flash_cases()
