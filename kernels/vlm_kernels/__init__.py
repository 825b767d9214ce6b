"""Triton kernels for training vision-language models with 4-bit bases.

The package is called `vlm_kernels`, never `kernels`: Hugging Face publishes a package of that name.
"""
