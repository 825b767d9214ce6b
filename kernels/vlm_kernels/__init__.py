"""Triton kernels for training vision-language models on 4-bit bases, each with its gradient.

On a GPU the public functions run Triton; on a CPU they run PyTorch. One kernel is one file, which begins with its formula, its shapes
and what it costs; `reference` holds the plain meaning. Nothing of vlm_dist is imported here.

The package is called `vlm_kernels`, never `kernels`: Hugging Face publishes a package of that name.
"""

from vlm_kernels.geglu import geglu
from vlm_kernels.grouped_linear import grouped_linear, grouped_outer
from vlm_kernels.layer_norm import layer_norm
from vlm_kernels.linear_cross_entropy import linear_cross_entropy
from vlm_kernels.nf4_dequantize import nf4_dequantize
from vlm_kernels.nf4_lora_linear import nf4_lora_linear
from vlm_kernels.rms_norm import rms_norm
from vlm_kernels.rope import mrope, rope
from vlm_kernels.swiglu import swiglu

__all__ = [
    "geglu",
    "grouped_linear",
    "grouped_outer",
    "layer_norm",
    "linear_cross_entropy",
    "mrope",
    "nf4_dequantize",
    "nf4_lora_linear",
    "rms_norm",
    "rope",
    "swiglu",
]
