"""What the trainer has recipes for.

Imports nothing of ours, so that the command line starts at once.
"""

LLM2VEC = "llm2vec"
TRAINED = ("llm2vec-gen", LLM2VEC)
# Of LLM2Vec, one after another.
STEPS = ("mntp", "simcse", "supervised")
# Where special tokens begin.
SPECIAL_INITS = ("mean", "draw")
