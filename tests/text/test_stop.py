import itertools

from hypothesis import given
from hypothesis import strategies as st

from chatpage.text.stop import StopStrings

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    """All that is sent, and whether a stop string was met."""
    stream, sent, met = StopStrings(stops), "", False
    for part in parts:
        text, met = stream.add(part)
        sent += text
        assert not any(stop in sent for stop in stops)
    return sent + stream.flush(), met


@given(STOPS, LETTERS, st.data())
def test_no_stop_string_leaks_whatever_the_splits(stops, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sent, met = run(stops, parts)
    assert not any(stop in sent for stop in stops)
    assert met == any(stop in text for stop in stops)
    assert text.startswith(sent)
    assert met or sent == text
    assert (sent, met) == run(stops, list(text))


@given(STOPS, LETTERS)
def test_only_what_may_become_a_stop_string_is_held_back(stops, text):
    sent, met = StopStrings(stops).add(text)
    held = text[len(sent) :]
    assert met or held == "" or any(stop.startswith(held) for stop in stops)


def test_the_stop_string_that_is_complete_first_counts():
    assert run(["END", "N"], ["the END"]) == ("the E", True)
    assert run(["\n\n"], ["one\n", "two\n", "\nthree"]) == ("one\ntwo", True)


def test_after_a_stop_nothing_comes():
    stream = StopStrings(["."])
    assert stream.add("one. two") == ("one", True)
    assert stream.add("three") == ("", True)
    assert stream.flush() == ""


def test_without_stop_strings_everything_passes_at_once():
    assert StopStrings([]).add("text") == ("text", False)


@given(STOPS, LETTERS, st.integers(0, 30), st.data())
def test_a_stop_string_within_exempt_text_is_text_and_one_that_ends_later_is_not(stops, text, exempt, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    exempt = min(exempt, len(text))
    edges = sorted({0, exempt, *cuts, len(text)})
    stream, sent, met = StopStrings(stops), "", False
    for a, b in itertools.pairwise(edges):
        safe, met = stream.add(text[a:b], exempt=b <= exempt)
        sent += safe
    sent += stream.flush()
    ends = (end for end in range(exempt + 1, len(text) + 1) if text[:end].endswith(tuple(stops)))
    end = next(ends, None)
    if end is None:
        assert (sent, met) == (text, False)
    else:
        longest = max(len(stop) for stop in stops if text[:end].endswith(stop))
        assert (sent, met) == (text[: end - longest], True)


def test_a_stop_string_that_begins_in_exempt_text_takes_its_beginning_along():
    stream = StopStrings(["END", "EN"])
    assert stream.add("The EN", exempt=True) == ("The ", False)
    assert stream.add("D") == ("", True)
    assert stream.flush() == ""
