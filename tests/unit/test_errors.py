"""The errors: what they consist of, in which words, and that they come out of another process as they were."""

from __future__ import annotations

import pickle

import pytest

import rtlynx

REFUSALS = [rtlynx.InvalidArgumentError, rtlynx.DeviceError, rtlynx.CompensationMismatchError]


@pytest.mark.parametrize("error", REFUSALS)
def test_a_refusal_says_what_it_consists_of(error: type[rtlynx.InvalidArgumentError]) -> None:
    plain = error("sparsify", "k", 65, "a multiple of 64")
    assert str(plain) == "sparsify: argument `k`: got 65, expected a multiple of 64"
    for said in (plain, error("sparsify", "k", 65, "a multiple of 64", "65 is not enough")):
        copied = pickle.loads(pickle.dumps(said))
        assert type(copied) is error and str(copied) == str(said)
        for each in (said, copied):
            assert (each.op, each.argument, each.got, each.expected) == ("sparsify", "k", "65", "a multiple of 64")
    assert plain.message == "got 65, expected a multiple of 64"
    assert str(said) == "sparsify: argument `k`: 65 is not enough"
    assert said.message == copied.message == "65 is not enough"


@pytest.mark.parametrize("error, builtin", [*zip(REFUSALS, [ValueError, RuntimeError, ValueError], strict=True)])
def test_refusals_are_what_callers_catch(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, rtlynx.RTLynxError) and issubclass(error, builtin)
