"""Serves readers: what a request goes through, the engines that run it, Triton's models, and the launcher. Needs no torch."""
