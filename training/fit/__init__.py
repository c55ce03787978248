"""Training of the demo readers."""
