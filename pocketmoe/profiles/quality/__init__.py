"""How well a bundle answers, against itself and against a reference."""
