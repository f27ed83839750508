"""LLM2Vec-Gen adapters: generate answers, embed them with a teacher, train, evaluate."""
