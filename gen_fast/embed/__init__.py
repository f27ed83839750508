"""Texts to embeddings: methods, adapters, `load` and the Encoder; and embeddings back to text."""
