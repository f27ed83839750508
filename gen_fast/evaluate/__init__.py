"""How good embeddings are; and the real texts that measure it, fetched when asked for."""
