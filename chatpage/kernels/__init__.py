"""Triton kernels: store, copy, attention of decodes, of shared prefixes and of chunks, and what merges them."""
