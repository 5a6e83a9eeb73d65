"""Which trajectory goes to which learner rank and micro-batch. Plain integers: the driver plans
from lengths alone."""

WORTH_A_CALL = 4096  # places of padding that are worth a call of attention of their own


def plan(lengths: list[int], *, ranks: int, tokens: int, width: int) -> list[list[list[int]]]:
    """Spread trajectories of `lengths` tokens over ranks, and each rank's share over micro-batches
    of ≤ `tokens`.

    Returns [rank][micro-batch][index into lengths]. Every rank gets the same number of
    micro-batches (an empty one still joins the collectives). Longest first, each to the rank with
    the least cost, then to the first micro-batch with room. A trajectory longer than `tokens` has a
    micro-batch of its own. Deterministic in `lengths`.

    cost = n · (12 · width + n): a layer of hidden size `width` does about 12 · width²
    multiplications for each of n tokens in its matrices (4 in attention, 8 in the MLP), and n ·
    width for it in causal attention (n / 2 keys, twice).

    >>> plan([5, 4, 3, 2], ranks=2, tokens=5, width=64)
    [[[0], [3]], [[1], [2]]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(i)
        load[rank] += lengths[i] * (12 * width + lengths[i])
    packed = [_first_fit(share, lengths, tokens) for share in shares]
    most = max(1, max(map(len, packed)))
    return [micros + [[] for _ in range(most - len(micros))] for micros in packed]


def _first_fit(share: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    micros: list[list[int]] = []
    room: list[int] = []
    for i in share:
        fits = next((m for m, free in enumerate(room) if lengths[i] <= free), None)
        if fits is None:
            micros.append([i])
            room.append(tokens - lengths[i])
        else:
            micros[fits].append(i)
            room[fits] -= lengths[i]
    return micros


def padded_groups(lengths: list[int]) -> list[list[int]]:
    """Put together segments that are padded to the longest of them: a shorter one begins a group
    where it is at most half as long, and all that are left save WORTH_A_CALL places by it.

    >>> padded_groups([9, 9000, 10, *[100] * 9]), padded_groups([9, 100, 10])
    ([[1], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]], [[0, 1, 2]])
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts: list[list[int]] = [[]]
    longest = lengths[order[0]]
    for done, i in enumerate(order):
        saved = (longest - lengths[i]) * (len(order) - done)
        if 2 * lengths[i] <= longest and saved >= WORTH_A_CALL:
            parts.append([])
            longest = lengths[i]
        parts[-1].append(i)
    return [sorted(part) for part in parts]
