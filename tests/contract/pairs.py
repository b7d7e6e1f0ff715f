"""All-pairs: few cases among which every pair of values of every two factors occurs."""

import itertools
from collections.abc import Callable, Mapping, Sequence


def all_pairs(factors: Mapping[str, Sequence[str]], allowed: Callable[..., bool]) -> list[tuple[str, ...]]:
    """A list of cases that covers every pair that some allowed case has.

    Args:
      factors: The values of each factor.
      allowed: Whether a full case (one value for each factor) makes sense.

    Returns:
      Cases in a fixed order.
    """
    cases = product(factors, allowed)
    places = list(itertools.combinations(range(len(factors)), 2))

    def pairs(case):
        return {(i, j, case[i], case[j]) for i, j in places}

    missing = set().union(*map(pairs, cases))
    chosen = []
    # Greedy: cases are tried by how much they add; a lazy queue keeps it fast.
    queue = sorted(cases, key=lambda case: hash_free_order(case))
    gain = {case: len(places) for case in queue}
    while missing:
        best, best_gain = None, 0
        for case in queue:
            if gain[case] <= best_gain:
                continue
            gain[case] = len(pairs(case) & missing)
            if gain[case] > best_gain:
                best, best_gain = case, gain[case]
                if best_gain == len(places):
                    break
        assert best is not None
        chosen.append(best)
        missing -= pairs(best)
    return sorted(chosen)


def hash_free_order(case: tuple[str, ...]) -> int:
    """A fixed but scattered order, so that neighbors differ in all factors."""
    number = 0
    for character in "|".join(case):
        number = (number * 1000003 + ord(character)) % 2147483647
    return number


def product(factors: Mapping[str, Sequence[str]], allowed: Callable[..., bool]) -> list[tuple[str, ...]]:
    """Every allowed case."""
    return [case for case in itertools.product(*factors.values()) if allowed(*case)]
