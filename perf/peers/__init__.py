"""Other ways to run the same readers, measured on the same questions."""
