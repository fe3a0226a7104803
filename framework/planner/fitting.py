"""From byte counts at several sizes to the polynomials that give them. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

import numpy as np

from framework.planner.law import CHUNK, Stretch
from framework.planner.options import COMPUTED, RETAINED
from framework.planner.polynomials import Monomial, Polynomial, Sizes

TOKENS = (
    (),
    ("batch",),
    ("tokens",),
    ("batch", "tokens"),
    ("real",),
    ("rows",),
    ("slots",),
    ("labels",),
    ("tokens", "tokens"),
    ("batch", "tokens", "tokens"),
    ("slots", "tokens"),
    ("rows", "tokens"),
    ("labels", "tokens"),
    (CHUNK,),
)
"""What a tensor has of a batch."""

WIDTHS = (
    (),
    ("hidden",),
    ("mlp",),
    ("vocab",),
    ("heads",),
    ("kv_heads",),
    ("head_dim",),
    ("rank",),
    ("positions",),
    ("head_dim", "heads"),
    ("head_dim", "kv_heads"),
    ("qkv",),
    ("hidden", "hidden"),
    ("hidden", "mlp"),
    ("hidden", "vocab"),
    ("head_dim", "heads", "hidden"),
    ("head_dim", "hidden", "kv_heads"),
    ("hidden", "qkv"),
    ("hidden", "rank"),
    ("mlp", "rank"),
    ("qkv", "rank"),
    ("rank", "vocab"),
    ("head_dim", "heads", "rank"),
    ("head_dim", "kv_heads", "rank"),
    ("hidden", "positions"),
    ("block",),
    ("block_trained",),
    ("block_packed",),
    ("parameters",),
    ("trained",),
    ("packed",),
)
"""What it has of a model."""

SHARES = ((), ("share",))
"""Whether a rank has a part of it: `share` is one over the number of ranks that have one each."""

TINY = 64
"""Bytes below which a size need not be a polynomial: the scales of a matrix in NF4 come in groups. Such a tensor is
taken to have so many."""

_DENOMINATOR = 32
"""Of a coefficient: bytes of a fraction of an element, such as the halves that rotary embeddings turn."""


_NEARLY_DENOMINATOR = 128
_PADDED_BYTES, _PADDED_SHARE = 8, 0.01
"""What rounding up may add: a matrix in NF4 is shared out in groups of 64 elements, its scales in groups of 256."""

OF_BATCHES = {symbol for monomial in TOKENS for symbol in monomial}
"""Symbols of a batch."""

_SUMS = {"block", "block_trained", "block_packed", "parameters", "trained", "packed"}


class UnknownSizeError(ValueError):
    """No polynomial of the kind that is looked for gives a byte count."""


class Fitter:
    """Finds polynomials of one or two terms; their products are those of `TOKENS` and `WIDTHS`.

    Args:
        samples: sizes of all symbols that occur, at each of the places where byte counts are known. The more there are,
            and the less they have in common, the less a polynomial fits by chance; six of primes or twice primes do.
    """

    def __init__(self, samples: Sequence[Sizes]) -> None:
        symbols = set(samples[0])
        pairs = [tokens + widths + share for tokens, widths, share in product(TOKENS, WIDTHS, SHARES)]
        self._monomials = [monomial for monomial in pairs if symbols.issuperset(monomial)]
        one = [Polynomial({monomial: 1}) for monomial in self._monomials]
        self._values = np.array([[p.value(sample) for sample in samples] for p in one])
        self._packed = any(sample.get("packed") for sample in samples)
        self._known: dict[tuple[int, ...], Polynomial] = {}

    def __call__(self, counts: Sequence[int]) -> Polynomial:
        """The polynomial that has these values, the simplest if there are several.

        Args:
            counts: one for each sample.

        Raises:
            UnknownSizeError: there is none.
        """
        key = tuple(counts)
        if key not in self._known:
            self._known[key] = self._fit(np.array(counts, dtype=float))
        return self._known[key]

    def _fit(self, counts: np.ndarray) -> Polynomial:
        if not counts.any():
            return Polynomial()
        found = self._one_term(counts)
        if found is None:
            found = self._two_terms(counts)
        if found is None and np.abs(counts).max() <= TINY:
            found = Polynomial({(): Fraction(int(np.sign(counts[0]) * TINY))})
        if found is None and self._packed:
            found = self._nearly(counts)
        if found is None:
            raise UnknownSizeError(f"no polynomial gives {[*map(int, counts)]}")
        return found

    def _one_term(self, counts: np.ndarray) -> Polynomial | None:
        # A batch without padding has no tokens but real ones, and a frozen block none that are trained.
        ratios = counts / np.where(self._values == 0, np.nan, self._values)
        (fitting,) = np.nonzero(np.ptp(ratios, axis=1) <= 1e-9 * np.abs(ratios[:, 0]))
        for index in sorted(fitting, key=lambda i: len(self._monomials[i])):
            coefficient = _rational(ratios[index, 0])
            if coefficient is not None:
                return Polynomial({self._monomials[index]: coefficient})
        return None

    def _two_terms(self, counts: np.ndarray) -> Polynomial | None:
        """Pairs of monomials: two samples give the coefficients, the others have to agree."""
        best: Polynomial | None = None
        a = self._values
        for index in range(len(a)):
            b = a[index + 1 :]
            determinant = a[index, 0] * b[:, 1] - a[index, 1] * b[:, 0]
            with np.errstate(divide="ignore", invalid="ignore"):
                first = (counts[0] * b[:, 1] - counts[1] * b[:, 0]) / determinant
                second = (a[index, 0] * counts[1] - a[index, 1] * counts[0]) / determinant
                rest = first[:, None] * a[index] + second[:, None] * b - counts
            (fitting,) = np.nonzero(np.abs(rest).max(axis=1) <= 1e-7 * np.abs(counts).max())
            for other in fitting:
                coefficients = _rational(first[other]), _rational(second[other])
                if coefficients[0] is None or coefficients[1] is None:
                    continue
                found = Polynomial(
                    {
                        self._monomials[index]: coefficients[0],
                        self._monomials[index + 1 + other]: coefficients[1],
                    }
                )
                if best is None or len(str(found)) < len(str(best)):
                    best = found
        return best

    def _nearly(self, counts: np.ndarray) -> Polynomial | None:
        """The closest polynomial in a model's sizes, for what is as long as ranks can share out evenly."""
        own = [index for index, monomial in enumerate(self._monomials) if not OF_BATCHES.intersection(monomial)]
        sums = [index for index in own if _SUMS.intersection(self._monomials[index])]
        best, least = None, 1.0
        for chosen in ([(index,) for index in own], combinations(sums, 2)):
            for indices in chosen:
                values = self._values[[*indices]].T
                unit = _DENOMINATOR if len(indices) > 1 else _NEARLY_DENOMINATOR
                coefficients = np.round(np.linalg.lstsq(values, counts, rcond=None)[0] * unit) / unit
                missed = np.abs(values @ coefficients - counts) / (_PADDED_BYTES + _PADDED_SHARE * np.abs(counts))
                if coefficients.all() and missed.max() < least:
                    terms = zip(indices, coefficients, strict=True)
                    best = Polynomial({self._monomials[i]: Fraction(int(c * unit), unit) for i, c in terms})
                    least = missed.max()
            if best is not None:
                return best
        return None


def stretch_of(changes: Sequence[Polynomial]) -> Stretch:
    """A stretch from its allocations, in order; frees are negative.

    Peaks that another one is never below are left out: those none of whose coefficients is above the other's, for
    layers that are retained and for layers that are computed.
    """
    names = sorted({monomial for change in changes for monomial in change.terms})
    split = {name: _split(name) for name in names}
    layers = sorted({layer for layer, _, _ in split.values() if layer})
    sizes = sorted({rest for _, _, rest in split.values()})
    places = {
        name: ((1 + 2 * layers.index(layer) + computed) if layer else 0, sizes.index(rest))
        for name, (layer, computed, rest) in split.items()
    }
    steps = np.zeros((len(changes) + 1, 1 + 2 * len(layers), len(sizes)), dtype=np.int64)
    for row, change in enumerate(changes, start=1):
        for name, coefficient in change.terms.items():
            steps[row, *places[name]] = coefficient * _NEARLY_DENOMINATOR
    levels = steps.cumsum(axis=0)
    _, first = np.unique(levels.reshape(len(levels), -1), axis=0, return_index=True)
    distinct = levels[first]
    # A level that another is never below comes after it, whatever the sizes.
    sums = distinct.sum(axis=(1, 2)) + distinct[:, 0].sum(axis=1)
    peaks = np.empty((0, *levels.shape[1:]), dtype=np.int64)
    for level in distinct[np.argsort(-sums, kind="stable")]:
        above = peaks - level
        if not (above[:, 0] + np.minimum(above[:, 1::2], above[:, 2::2]).sum(axis=1) >= 0).all(axis=1).any():
            peaks = np.concatenate((peaks, level[None]))

    def polynomial(level: np.ndarray) -> Polynomial:
        return Polynomial({name: Fraction(int(level[place]), _NEARLY_DENOMINATOR) for name, place in places.items()})

    return Stretch(polynomial(levels[-1]), tuple(map(polynomial, peaks)))


def _split(monomial: Monomial) -> tuple[str, bool, Monomial]:
    """The layer that a monomial is of, if any, whether it is of its computation, and the other factors."""
    for symbol in monomial:
        for prefix in (RETAINED, COMPUTED):
            if symbol.startswith(prefix):
                rest = tuple(other for other in monomial if other != symbol)
                return symbol.removeprefix(prefix), prefix == COMPUTED, rest
    return "", False, monomial


def _rational(value: float) -> Fraction | None:
    """The coefficient, if it is one that a byte count can have."""
    scaled = round(value * _DENOMINATOR)
    if scaled == 0 or abs(value * _DENOMINATOR - scaled) > 1e-5 * max(1.0, abs(scaled)) or abs(value) > 4096:
        return None
    return Fraction(scaled, _DENOMINATOR)
