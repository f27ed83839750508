"""What a backbone computes in.

Imports nothing of ours, so that the command line starts at once.
"""

DTYPES = ("float32", "bfloat16", "float16")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
