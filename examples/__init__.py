"""A first example: both demo readers answer three questions."""
