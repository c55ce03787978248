"""The way to a server: address, TLS, retries, what it serves, and why it cannot be reached."""
