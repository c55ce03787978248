"""Readers behind a real Triton: workloads, perf_analyzer, sweeps, accuracy."""
