"""What serves a reader: the chain behind a request, the engines it runs on, Triton's models, and the launcher. Needs no torch."""
