"""A run's files as a page, a summary and a verdict."""
