"""Processes that start in milliseconds: forked from a server that has imported what they need."""

import multiprocessing

processes = multiprocessing.get_context("forkserver")
# It imports and runs nothing: no thread of torch's, no lock that a child would find taken.
processes.set_forkserver_preload(
    [
        "gen_fast.jobs.job",
        "transformers",
        "torch._dynamo",  # the optimizers import it
        "gen_fast.training.llm2vec_gen",
        "gen_fast.training.llm2vec",
        "gen_fast.training.gem",
    ]
)
