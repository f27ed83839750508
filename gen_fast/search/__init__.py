"""Nearest neighbours: exact, and through FAISS indexes over the embeddings of a job."""
