"""What the trainer has recipes for.

Imports nothing of ours, so that the command line starts at once.
"""

LLM2VEC = "llm2vec"
GEM = "gem"
TRAINED = ("llm2vec-gen", LLM2VEC, GEM)
# Of LLM2Vec, one after another.
STEPS = ("mntp", "simcse", "supervised")
# Where special tokens begin.
SPECIAL_INITS = ("mean", "draw")
# How the learning rate falls.
SCHEDULES = ("linear", "cosine")
# Of GEM: where special tokens stand in training.
FORMS = ("reconstruct", "insert")
