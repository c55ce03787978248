"""The encoder by library kernels: loaded without torch and without a compiler."""
