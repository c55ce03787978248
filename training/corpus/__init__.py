"""The demo corpus: World Factbook passages, questions about them, the tokenizer."""
