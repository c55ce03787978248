"""Checkpoints: configuration, weights, files, conversion of FiD to FiDO, transformers' T5 with the same weights."""
