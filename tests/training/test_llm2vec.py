"""LLM2Vec's steps: masks, losses, gradient caching, ranks, and whole runs."""
