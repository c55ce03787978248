"""Finds, starts, watches, restarts and ends tritonserver."""
