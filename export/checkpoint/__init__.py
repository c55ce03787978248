"""Checkpoints: their configuration, weights and files; conversion of FiD to FiDO."""
