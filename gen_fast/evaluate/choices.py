"""What users may choose in this room. Imports nothing, so that the command line can ask it."""

# Names of collections of tasks: ours; MTEB(eng, v2); BRIGHT(v1.1), short documents; AdvBench-IR.
SUITES = ("local", "mteb", "bright", "advbench-ir")
# Where instructions come from; or a file of them.
PUBLISHED_INSTRUCTIONS = "llm2vec-gen"
INSTRUCTIONS = ("auto", "none", PUBLISHED_INSTRUCTIONS)
