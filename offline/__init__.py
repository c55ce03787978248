"""Answers millions of questions on many machines, on Ray Data: files in, Parquet out, and nothing is done twice."""
