"""What decides the text, as transformers reads it: tokenizer, chat template, ends."""
