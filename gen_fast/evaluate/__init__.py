"""How good embeddings are, by tasks of mteb; and the real texts that measure it."""
