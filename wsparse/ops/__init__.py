"""Kernels for one platform each, beside the plain JAX that they must agree with bit for bit."""
