"""The reference against independent statements of the same rules: sorting, hand-packed words, plain products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtlynx import reference
from rtlynx.reference import BLOCK_COLS, GROUP, TILE_ROWS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sorted_mask(x: torch.Tensor, score: torch.Tensor | None = None) -> torch.Tensor:
    """Top-2 of 4 by a stable sort."""
    magnitude = x.float().abs() if score is None else (x.float() * score).abs()
    groups = magnitude.unflatten(1, (-1, GROUP))
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_what_a_stable_sort_keeps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randint(-4, 5, (50, 256)).to(dtype)  # full of ties
    assert torch.equal(reference.keep_mask(x), sorted_mask(x))
    score = torch.rand(256)
    assert torch.equal(reference.keep_mask(x, score), sorted_mask(x, score))


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), -float("inf"), float("nan")]), min_size=4, max_size=4))
def test_nan_ranks_above_infinity_and_ties_go_to_the_lower_channel(group: list[float]) -> None:
    def rank(x: float) -> float:
        return 1e9 if x != x else min(abs(x), 1e6)

    best = sorted(range(4), key=lambda i: (-rank(group[i]), i))[:2]
    for dtype in DTYPES:
        mask = reference.keep_mask(torch.tensor([group], dtype=dtype))[0]
        assert mask.nonzero().flatten().tolist() == sorted(best)


def test_a_group_of_zeros_keeps_channels_0_and_1() -> None:
    sparse = reference.sparsify(torch.zeros(1, 64))
    assert (sparse.metadata == 0x44444444).all()
    assert sparse.row_scale.item() == 0


@pytest.mark.parametrize("m, k", [(1, 64), (17, 320), (64, 256), (130, 832)])
def test_words_hold_the_nibbles_that_the_format_document_says(m: int, k: int) -> None:
    torch.manual_seed(m)
    x = torch.randn(m, k)
    positions = reference.kept_positions(reference.keep_mask(x))
    words = reference.pack_metadata(positions)
    assert words.shape == reference.metadata_shape(m, k)
    blocks, tiles = words.shape[:2]
    assert tiles * TILE_ROWS % 64 == 0
    for block in range(blocks):
        for tile in range(tiles):
            for lane, j in [(0, 0), (7, 3), (22, 1), (31, 2)]:
                g, q = divmod(lane, 4)
                word = words[block, tile, lane, j].item() & 0xFFFFFFFF
                for half in range(2):
                    row = TILE_ROWS * tile + g + 8 * half
                    for c in range(4):
                        group = (BLOCK_COLS * block + 64 * j + 16 * q) // GROUP + c
                        nibble = 4
                        if row < m and group < k // GROUP:
                            first, second = positions[row, group].tolist()
                            nibble = first | second << 2
                        assert word >> (16 * half + 4 * c) & 0xF == nibble
    assert torch.equal(reference.unpack_metadata(words, m, k), positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decompress_gives_back_the_selection(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(70, 448).to(dtype)
    sparse = reference.sparsify(x)
    assert torch.equal(reference.decompress(sparse.values, sparse.metadata), torch.where(sorted_mask(x), x, 0))


def test_norm_compensation_restores_the_norm_of_every_token() -> None:
    torch.manual_seed(2)
    x = torch.randn(40, 512)
    sparse = reference.sparsify(x)
    kept = reference.decompress(sparse.values, sparse.metadata) * sparse.row_scale[:, None]
    torch.testing.assert_close(kept.norm(dim=1), x.norm(dim=1))
    assert (sparse.row_scale > 1).all()


@pytest.mark.parametrize("norm_compensation", [True, False])
def test_branches(norm_compensation: bool) -> None:
    torch.manual_seed(3)
    x, down, shift = torch.randn(30, 128), torch.randn(128, 16), torch.randn(128)
    for branch_input in ("input", "dropped"):
        sparse = reference.sparsify(x, None, shift, down, branch_input, norm_compensation)
        z = x - shift
        if branch_input == "dropped":
            z = z - reference.decompress(sparse.values, sparse.metadata)
        torch.testing.assert_close(sparse.branch, z @ down, rtol=1e-4, atol=1e-4)


def test_split_with_a_full_rank_branch_is_the_dense_layer() -> None:
    """(X - S(X))·C with C = Wᵀ adds back exactly what selection lost: the identity behind `split`."""
    torch.manual_seed(4)
    x, weight = torch.randn(20, 64), torch.randn(8, 64)
    sparse = reference.sparsify(x, comp_down=torch.eye(64), norm_compensation=False)
    out = reference.sparse_linear(sparse.values, sparse.metadata, weight, None, sparse.branch, weight)
    torch.testing.assert_close(out, x @ weight.T, rtol=1e-4, atol=1e-4)
