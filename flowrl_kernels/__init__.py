"""FlowRL kernels."""
