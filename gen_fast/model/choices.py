"""What a backbone computes in, and what its weights are kept in.

Imports nothing of ours, so that the command line starts at once.
"""

DTYPES = ("float32", "bfloat16", "float16")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# What the weights of the layers' linears can be quantised to.
INT4, INT8_WEIGHT_ONLY, INT8, FP8 = QUANTIZED = ("int4", "int8-weight-only", "int8", "fp8")
# Of those whose weights have a scale and a minimum for each group: the bits of a weight.
GROUP_BITS = {INT4: 4, INT8_WEIGHT_ONLY: 8}
