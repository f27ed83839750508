"""Corpus jobs: embed what does not fit in memory, on one machine or many, and search it."""
