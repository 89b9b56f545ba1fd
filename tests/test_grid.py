import pytest
import torch

from heterostep.grid import TokenGrid

GRID = TokenGrid(3, 2, 4)


def of(tokens, grid=GRID):
    """bool [1, N], true for these tokens."""
    chosen = torch.zeros(1, grid.num_tokens, dtype=torch.bool)
    chosen[0, tokens] = True
    return chosen


def where(values, shape):
    """The places of the values of the first channel."""
    return values.expand(*shape)[0, 0].nonzero().tolist()


def test_values_in_the_tokens_own_layout():
    values = GRID.values_of(of([1, 5]), (1, 24, 16))
    assert values.expand(1, 24, 16).sum() == 32 and values[0, :, 0].nonzero().flatten().tolist() == [1, 5]


def test_extra_tokens_are_values_where_they_are_stepped_too():
    grid = TokenGrid(3, 2, 4, extra=2)
    tokens = of([0, 25], grid)
    assert grid.values_of(tokens, (1, 26, 16)).flatten().nonzero().flatten().tolist() == [0, 25]
    assert grid.values_of(tokens, (1, 24, 16)).flatten().nonzero().flatten().tolist() == [0]
    assert where(grid.values_of(tokens, (1, 16, 3, 2, 4)), (1, 16, 3, 2, 4)) == [[0, 0, 0]]


def test_a_token_is_a_patch_of_pixels():
    shape = (1, 16, 3, 4, 8)
    # Token 13: frame 1, row 1, column 1.
    expected = [[1, row, column] for row in (2, 3) for column in (2, 3)]
    assert where(GRID.values_of(of([13]), shape), shape) == expected


def test_the_last_row_and_column_may_be_cut_in_half():
    shape = (1, 16, 3, 3, 7)
    assert where(GRID.values_of(of([7]), shape), shape) == [[0, 2, 6]]


def test_given_first_frames_may_be_left_out():
    shape = (1, 16, 2, 2, 4)
    assert where(GRID.values_of(of([0, 8]), shape), shape) == [[0, 0, 0]]


@pytest.mark.parametrize(
    "shape",
    [
        *[(24, 16), (1, 23, 16), (2, 24, 16), (2, 16, 3, 4, 8)],
        # Fewer rows than the tokens have, more than two for a token with a rest, a rest of frames.
        *[(1, 16, 3, 1, 8), (1, 16, 3, 5, 8), (1, 16, 3, 4, 11), (1, 16, 5, 4, 8), (1, 16, 3, 4, 6)],
    ],
)
def test_of_another_layout_nothing_is_said(shape):
    assert GRID.values_of(of([0]), shape) is None
