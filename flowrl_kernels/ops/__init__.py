"""The contract with PyTorch: custom operators with their fakes and their autograd."""
