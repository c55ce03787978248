"""A Triton gRPC client for served readers, FiD's data format and metric, and the command line `python -m clients`.

In: a question and its passages. Out: the reader's answer, its log-probability and its latency. The package imports nothing heavier than
NumPy, tritonclient and tqdm; `clients.metrics` and `clients.examples` need only the standard library, so training uses them without gRPC.
"""
