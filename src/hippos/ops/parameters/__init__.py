"""GPU programs that make what the convolutions take from an SSM's parameters, one for many small steps of PyTorch."""
