"""The mixture, slowly: one loop over everything from step 0, permutations written out, plain Python integers."""

import math

WORD = 2**64 - 1


def hashed(*words: int) -> int:
    state = 0
    for word in words:
        state = (state + (word + 1) * 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return state


def permutation(size: int, key: int) -> list[int]:
    """The whole epoch as a list: cells of a grid, sheared by rows and columns, those outside sent through again."""
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)

    def shear(cell: int) -> int:
        row, column = divmod(cell, width)
        for number in range(0, 16, 2):
            row = (row + hashed(key, number, column)) % height
            column = (column + hashed(key, number + 1, row)) % width
        return row * width + column

    order = []
    for position in range(size):
        cell = shear(position)
        while cell >= size:
            cell = shear(cell)
        order.append(cell)
    return order


def rows_in_order(tasks: list[int], sizes: list[int], keys: dict[tuple[int, int], int]) -> list[int]:
    """Row of every draw, given the tasks of all draws since step 0 and the key of every (task, epoch)."""
    drawn = [0] * len(sizes)
    rows = []
    for task in tasks:
        epoch, position = divmod(drawn[task], sizes[task])
        rows.append(permutation(sizes[task], keys[task, epoch])[position])
        drawn[task] += 1
    return rows
