"""FiD's data format and passage files. Needs only the standard library."""
