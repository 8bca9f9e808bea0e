"""The Triton kernels, for CUDA tensors."""
