"""Rows in, embeddings out: files of texts and of embeddings, written whole, in fewer bytes."""
