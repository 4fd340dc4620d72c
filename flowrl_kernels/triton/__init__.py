"""Triton kernels and their launchers: tensors in, tensors out. Imported only when a caller asks for them."""
