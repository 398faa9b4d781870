"""The model: a file becomes a frozen transformers model. Only this room knows transformers."""
