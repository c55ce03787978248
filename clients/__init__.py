"""What asks a served reader: a Triton gRPC client, FiD's data format and metric, and `python -m clients`.

In: a question and its passages. Out: the reader's answer, its log-probability and what it cost. Nothing here imports anything heavier than
NumPy, tritonclient and tqdm; `clients.metrics` and `clients.examples` are standard library alone, so training may use them without gRPC.
"""
