"""Triton kernels, each beside the plain torch that is its reference and runs where there is no GPU."""
