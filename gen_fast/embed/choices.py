"""Default model and names of methods.

Imports nothing of ours, so that the command line starts at once.
"""

DEFAULT_MODEL = "smollm2-135m"

DEFAULT_METHOD = "mean"
LLM2VEC_GEN = "llm2vec-gen"
LLM2VEC = "llm2vec"
LLM2VEC_BARE = "llm2vec-bare"
GEM = "gem"
SENTENCE_TRANSFORMERS = "sentence-transformers"
METHODS = (
    DEFAULT_METHOD,
    "weighted-mean",
    "last-token",
    "echo",
    "hyde",
    LLM2VEC,
    LLM2VEC_BARE,
    LLM2VEC_GEN,
    GEM,
    SENTENCE_TRANSFORMERS,
)
