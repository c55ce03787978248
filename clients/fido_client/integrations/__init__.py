"""Readers in RAG frameworks, one module each. A module imports its framework; the client itself needs none of them."""
