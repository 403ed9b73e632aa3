"""A published checkpoint as transformers reads it: files, settings, tensors, tokenizer, template."""
