"""The encoder's GEMMs as library kernels: compiled ahead of time, with the weights as they read them."""
