"""Wishes that cannot be obeyed are refused in one sentence that names them."""

import math
from typing import Any

import pytest

from chatpage.errors import RequestError
from chatpage.schedule.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 2.1, math.nan, math.inf, True, "1", None, 10**400, [1]]),
        ("top_k", [-1, 1.0, True, 2**31]),
        ("top_p", [0, -0.1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan, False]),
        ("repetition_penalty", [0, -1, 0.001, 101, math.inf, math.nan, "1"]),
        ("presence_penalty", [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.1, 2.1, -math.inf]),
        ("seed", [2**63, -(2**63) - 1, 1.0, True]),
        ("max_tokens", [0, -1, 1.5, True]),
        ("min_tokens", [-1, 1.0, True, 2**31, None]),
        ("logprobs", [-1, 21, 1.0, True]),
        ("stop", ["end", ["end"], ("",), ("a" * 65,), (3,), tuple("abcde")]),
        ("stop_token_ids", [[3], 3, (-1,), (1.0,), (True,), ("3",), tuple(range(1025))]),
        (
            "logit_bias",
            [
                {3: 1.0},
                [(3, 1.0)],
                (3, 1.0),
                ((3,),),
                ((3, 1.0, 2.0),),
                ((3, 100.5),),
                ((3, -101),),
                ((3, math.nan),),
                ((3, True),),
                ((-1, 1.0),),
                (("3", 1.0),),
                ((3, 1.0), (3, 2.0)),
                tuple((token, 1.0) for token in range(1025)),
            ],
        ),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, values: list[Any]):
    for value in values:
        with pytest.raises(RequestError) as refusal:
            SamplingParams(**{name: value})
        message = str(refusal.value)
        assert refusal.value.param == name
        assert name in message
        assert message.endswith(".")
        assert "\n" not in message
        assert len(message) < 300


def test_min_tokens_beyond_max_tokens_are_refused():
    with pytest.raises(RequestError, match="min_tokens is 4; it must be at most max_tokens, which is 3"):
        SamplingParams(max_tokens=3, min_tokens=4)
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 1, "repetition_penalty": 0.01, "logprobs": 0},
        {"temperature": 2, "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 100, "logprobs": 20},
        {"logit_bias": tuple((token, 100) for token in range(1024)), "stop_token_ids": tuple(range(1024))},
        {"stop": ("a" * 64,) * 4, "seed": -(2**63), "max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1},
    ],
)
def test_the_ends_of_the_ranges_are_allowed_and_everything_is_hashable(values: dict[str, Any]):
    assert hash(SamplingParams(**values)) == hash(SamplingParams(**values))
