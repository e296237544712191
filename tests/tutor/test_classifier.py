"""The classifier that looks for unclear phrasings, and what is asked back there."""

from chatpage.tutor import texts
from chatpage.tutor.classifier import Classifier, Guess, features, report, unsure

corpus = texts.load()


def test_it_learns_words_and_forgives_a_slip_of_the_finger() -> None:
    colours = [(f"the {word} one is a colour", "colour") for word in ("red", "green", "yellow", "purple")]
    animals = [(f"some {word} lives in the wood", "animal") for word in ("fox", "badger", "hare", "squirrel")]
    classifier = Classifier([*colours, *animals])
    guesses = classifier.guesses(["a sqirrel", "yelow", "which colour"], best=2)
    assert [guess.topic for guess in guesses] == ["animal", "colour", "colour"]
    assert all(abs(sum(guess.chances) - 1) < 1e-5 for guess in guesses)


def test_case_and_outer_signs_are_no_features() -> None:
    assert features("What is a block?").equal(features("what is a block"))
    assert not features("what is a block").equal(features("what is a slot"))


def test_what_is_taken_for_another_topic_or_hardly_for_its_own_is_unsure() -> None:
    sure = {text: Guess([topic.id], [0.9]) for topic in corpus.subjects for text in topic.questions}
    wrong, faint, far, *_ = corpus.topics["block"].questions
    guesses = sure | {
        wrong: Guess(["slot", "block", "hi"], [0.6, 0.3, 0.05]),
        faint: Guess(["block", "hi", "slot"], [0.2, 0.15, 0.1]),
        far: Guess(["hi", "cow", "fork"], [0.5, 0.2, 0.1]),
    }
    assert unsure(corpus, guesses) == {wrong: ["slot", "block"], faint: ["block", "slot"], far: ["cow", "block"]}
    assert next(report(corpus, guesses)) == f"block: {wrong} => slot (0.60)"
