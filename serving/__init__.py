"""What runs inside Triton: prompt and tokenizer, engine runners, key/value slots, the decode loop. Never imports export/ or torch."""
