"""`SparsityConfig` and its globs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rtlynx
from rtlynx.patterns import expand_braces, first_match

components = st.text("abz019_-", min_size=1, max_size=5)
names = st.lists(components, min_size=1, max_size=6).map(".".join)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("blocks.*.attn.to_q", "blocks.3.attn.to_q", True),
        ("blocks.*.attn.to_q", "blocks.3.4.attn.to_q", False),  # * is one component
        ("blocks.*.attn.to_q", "blocks.attn.to_q", False),
        ("blocks.*.attn.to_q", "single_blocks.3.attn.to_q", False),  # a full match
        ("blocks.*.attn.to_q", "blocks.3.attn.to_q.base_layer", False),
        ("norm*.linear", "norm.linear", True),  # inside a component * may be empty
        ("norm*.linear", "norm1_context.linear", True),
        ("**.to_q", "to_q", True),  # ** may be nothing
        ("**.to_q", "a.b.c.to_q", True),
        ("**.to_q", "a.into_q", False),
        ("a.**.b", "a.b", True),
        ("a.**.b", "a.x.y.b", True),
        ("**.#.**.to_q", "blocks.12.attn.to_q", True),  # # is a number
        ("**.#.**.to_q", "0.to_q", True),
        ("**.#.**.to_q", "blocks.x1.attn.to_q", False),
        ("a#.b", "a1.b", False),  # only as a whole component
        ("time.**", "time.mlp.0", True),
        ("time.**", "timeless.mlp.0", False),
        ("attn.{to_q,to_out.0}", "attn.to_out.0", True),
        ("attn.{to_q,to_out.0}", "attn.to_out", False),
        ("{a,b{c,d}}.e", "bd.e", True),
        ("{a,b{c,d}}.e", "b.e", False),
        ("a+b.(c)", "a+b.(c)", True),  # other characters mean themselves
        ("a.b", "axb", False),
    ],
)
def test_glob(pattern: str, name: str, matches: bool) -> None:
    assert (first_match(name, [pattern]) == pattern) is matches


@given(names)
def test_a_name_matches_itself_and_every_generalisation_of_one_component(name: str) -> None:
    parts = name.split(".")
    assert first_match(name, [name]) == name
    for i in range(len(parts)):
        general = ".".join([*parts[:i], "*", *parts[i + 1 :]])
        assert first_match(name, [general]) == general
        assert first_match(name + ".more", [general]) is None
    assert first_match(name, ["**"]) == "**"


@given(st.lists(names, min_size=1, max_size=4), names)
def test_braces_are_the_union_of_their_alternatives(alternatives: list[str], name: str) -> None:
    pattern = "{" + ",".join(alternatives) + "}.end"
    assert expand_braces(pattern) == [f"{a}.end" for a in alternatives]
    assert (first_match(f"{name}.end", [pattern]) is not None) is (name in alternatives)


@pytest.mark.parametrize("pattern", ["", "a..b", ".a", "a{b", "a}b", "{a,{b}"])
def test_malformed_patterns_are_refused_when_the_configuration_is_made(pattern: str) -> None:
    with pytest.raises(rtlynx.InvalidArgumentError):
        rtlynx.SparsityConfig(skip=(pattern,))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rank", 8),
        ("rank", 144),
        ("rank", -16),
        ("rank", True),
        ("rank", 16.0),
        ("branch", "outside"),
        ("selection", "random"),
        ("precision", "fp4"),
        ("precision", None),
        ("norm_compensation", 1),
        ("share_inputs", None),
        ("fuse", "yes"),
        ("skip", "a.string"),
        ("include", ("a", 3)),
        ("ranks", 16),
        ("dense_first", -0.1),
        ("dense_last", 2),
    ],
)
def test_invalid_values_name_the_argument(argument: str, value: Any) -> None:
    with pytest.raises(rtlynx.InvalidArgumentError) as error:
        rtlynx.SparsityConfig(**{argument: value})
    assert error.value.argument == argument
    assert repr(value) in str(error.value)


@given(
    st.builds(
        rtlynx.SparsityConfig,
        include=st.none() | st.lists(names).map(tuple),
        skip=st.lists(names).map(tuple),
        rank=st.sampled_from([0, 16, 128]),
        ranks=st.lists(st.tuples(names, st.sampled_from([0, 32]))).map(tuple),
        dense_first=st.sampled_from([0.0, 0.25]),
        dense_last=st.floats(0, 1),
        norm_compensation=st.booleans(),
        adaln_shift=st.booleans(),
        fuse=st.booleans(),
        branch=st.sampled_from(["none", "input", "dropped"]),
        selection=st.sampled_from(["magnitude", "weight"]),
        precision=st.sampled_from(["model", "fp8"]),
    )
)
def test_survives_json(config: rtlynx.SparsityConfig) -> None:
    assert rtlynx.SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_compensation_serves_every_precision() -> None:
    assert rtlynx.SparsityConfig(precision="fp8").same_arithmetic(rtlynx.SparsityConfig())
    assert not rtlynx.SparsityConfig(precision="fp8").same_arithmetic(rtlynx.SparsityConfig(branch="input"))
    assert not rtlynx.SparsityConfig(adaln_shift=True).same_arithmetic(rtlynx.SparsityConfig())


def test_a_compensation_serves_fused_and_not() -> None:
    assert rtlynx.SparsityConfig(fuse=False).same_arithmetic(rtlynx.SparsityConfig())


def test_configurations_from_before_there_were_precisions_and_fusions_are_read() -> None:
    old = rtlynx.SparsityConfig().to_dict()
    del old["precision"], old["fuse"]
    read = rtlynx.SparsityConfig.from_dict(old)
    assert read.precision == "model" and read.fuse


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(rtlynx.InvalidArgumentError, match="rang"):
        rtlynx.SparsityConfig.from_dict({"rang": 16})


def test_lists_become_tuples_so_that_the_configuration_hashes() -> None:
    config = rtlynx.SparsityConfig(include=["a"], skip=["b"])  # type: ignore[arg-type]
    assert hash(config) == hash(rtlynx.SparsityConfig(include=("a",), skip=("b",)))


def test_ranks_of_single_layers_the_first_pattern_counts() -> None:
    config = rtlynx.SparsityConfig(rank=64, ranks={"a.*": 0, "**.c": 128})
    assert [config.rank_of(name) for name in ("a.c", "b.c", "b.d")] == [0, 128, 64]
    assert config.ranks == (("a.*", 0), ("**.c", 128)) and hash(config)
    with pytest.raises(rtlynx.InvalidArgumentError, match="multiple of 16"):
        rtlynx.SparsityConfig(ranks={"a": 8})
