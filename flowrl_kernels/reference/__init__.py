"""The specification: plain torch, one page each, differentiable by autograd, exact in float64."""
