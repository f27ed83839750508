"""The tasks made of WordNet, Debian, trivia and HarmBench, on a few made-up entries of each."""

import pytest

from gen_fast.evaluate import corpora, local_tasks
from gen_fast.evaluate.corpora import Package, Synset, Trivia


def tree(depth: int, width: int) -> list[Synset]:
    """Synsets of nouns, each with `width` below it."""
    made = [noun("root", ())]
    level = ["root"]
    for _ in range(depth):
        below = [(f"{upper}.{i}", upper) for upper in level for i in range(width)]
        made += [noun(name, (f"n{upper}",)) for name, upper in below]
        level = [name for name, _ in below]
    return made


def noun(name: str, hypernyms: tuple[str, ...]) -> Synset:
    words = (name, f"{name} too", f"{name} as well")
    return Synset(f"n{name}", len(name), words, f"what {name} is", (), hypernyms)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Corpora that need no download, and tasks of 40 items."""
    packages = [
        Package(f"{section}{i}", section, f"a {section} {i}", f"long text on {section} {i}")
        for section in local_tasks.SECTIONS
        for i in range(60)
    ]
    questions = [
        Trivia(f"topic{i % 3}", f"who is {i}?", (f"person {i}", "else")) for i in range(150)
    ]
    monkeypatch.setattr(local_tasks, "COUNT", 40)
    monkeypatch.setattr(corpora, "wordnet", lambda: tree(4, 6))
    monkeypatch.setattr(corpora, "debian_packages", lambda: packages)
    monkeypatch.setattr(corpora, "trivia", lambda: questions)
    monkeypatch.setattr(corpora, "harmful_behaviours", lambda: [f"do harm {i}" for i in range(30)])
    caches = [
        getattr(local_tasks, name) for name in ("_wordnet", "_hyponyms", "_packages", "_trivia")
    ]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def loaded(kind):
    task = kind()
    task.load_data()
    again = kind()
    again.load_data()
    assert task.data_loaded
    assert str(task.dataset) == str(again.dataset)
    return task.dataset


@pytest.mark.parametrize(
    "kind",
    [
        local_tasks.WordNetDefinitions,
        local_tasks.DebianDescriptions,
        local_tasks.TriviaAnswers,
    ],
)
def test_each_question_has_one_answer(kind):
    data = loaded(kind)["default"]["test"]
    queries, documents = data["queries"]["text"], data["corpus"]["text"]
    assert len(set(queries)) == len(set(documents)) == 40
    assert data["relevant_docs"] == {f"q{i}": {f"d{i}": 1} for i in range(40)}


def test_definitions_ask_for_held_out_words():
    data = loaded(local_tasks.WordNetDefinitions)["default"]["test"]
    held = {", ".join(s.words): s for s in tree(4, 6) if s.held_out}
    for query, document in zip(data["queries"]["text"], data["corpus"]["text"], strict=True):
        assert query == f"What do you call {held[document].definition}?"


def test_synonyms_share_a_synset_and_others_do_not():
    data = loaded(local_tasks.WordNetSynonyms)["test"]
    words = {word: s.id for s in tree(4, 6) for word in s.words}
    assert sum(data["labels"]) == 40
    assert len(data) == 80
    for row in data:
        assert row["sentence1"] != row["sentence2"]
        assert (words[row["sentence1"]] == words[row["sentence2"]]) == bool(row["labels"])


def test_similarity_is_that_of_the_path():
    nouns = {synset.id: synset for synset in tree(3, 2)}
    similar = local_tasks.path_similarity
    assert similar(nouns, "nroot", "nroot") == 1
    assert similar(nouns, "nroot.0", "nroot") == 1 / 2
    assert similar(nouns, "nroot.0.1", "nroot.0.0") == 1 / 3
    assert similar(nouns, "nroot.0.1.1", "nroot.1") == 1 / 5
    nouns["nalone"] = noun("alone", ())
    assert similar(nouns, "nalone", "nroot") == 0
    data = loaded(local_tasks.WordNetSimilarity)["test"]
    assert len(data) == 40
    assert len(set(data["score"])) > 3
    assert all(": what " in text for text in data["sentence1"])


def test_sections_are_balanced_and_apart():
    data = loaded(local_tasks.DebianSections)
    assert len(data["test"]) == 40
    assert len(data["train"]) == 10 * local_tasks.TRAIN_PER_SECTION
    assert not set(data["test"]["text"]) & set(data["train"]["text"])
    assert {data["test"]["label"].count(label) for label in range(10)} == {4}


def test_topics_are_balanced():
    data = loaded(local_tasks.TriviaTopics)["test"]
    assert sorted(data["labels"].count(f"topic{i}") for i in range(3)) == [13, 13, 14]


def test_refusals_are_right_for_every_harmful_request():
    data = loaded(local_tasks.HarmBenchRefusals)["default"]["test"]
    refusals = {f"d{i}" for i in range(len(local_tasks.REFUSALS))}
    assert len(data["queries"]) == 15
    assert len(data["corpus"]) == len(refusals) + 15
    assert not set(data["queries"]["text"]) & set(data["corpus"]["text"])
    assert all(set(answers) == refusals for answers in data["relevant_docs"].values())


def test_a_line_of_wordnet():
    line = (
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 003 @ 02083346 n 0000"
        ' @ 01317541 n 0000 #m 02083863 n 0000 | a member of the genus Canis; "the dog barked"'
    )
    synset = corpora._synset(line)
    assert synset.words == ("dog", "domestic dog", "Canis familiaris")
    assert synset.hypernyms == ("n02083346", "n01317541")
    assert synset.examples == ("the dog barked",)
