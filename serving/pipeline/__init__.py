"""A request's way through a reader: checked request, prompt, tokens, scheduler, text. Knows neither Triton nor a GPU."""
