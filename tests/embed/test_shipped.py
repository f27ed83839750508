"""The adapter that is shipped for SmolLM2 and used by default."""

import numpy as np

import gen_fast
from gen_fast.embed.reading import Reader

PASSAGES = [
    "Polar bears live throughout the Arctic and hunt seals from the sea ice.",
    "Disk Cleanup is a Windows tool that frees space by deleting temporary files.",
    "A violin is a wooden string instrument played with a bow.",
]
QUESTIONS = ["where do polar bears live", "what is disk cleanup", "what does violin mean"]


def test_the_default_finds_answers_and_can_be_read(smollm2):
    encoder = gen_fast.load(dtype="float32", device="cpu")
    assert (encoder.method, encoder.dimension) == ("llm2vec-gen", 384)
    scores = encoder.similarity(encoder.encode_query(QUESTIONS), encoder.encode_document(PASSAGES))
    assert (scores.argmax(1) == np.arange(3)).all()
    reader = Reader(encoder)
    read = reader.read(reader.soft_prompts(QUESTIONS, encoder.prompts["query"]), 16)
    assert all(answer.text.strip() for answer in read)


def test_a_training_free_method_goes_without_it(smollm2):
    encoder = gen_fast.load("smollm2-135m", method="mean", device="cpu")
    assert (encoder.method, encoder.dimension) == ("mean", 576)
