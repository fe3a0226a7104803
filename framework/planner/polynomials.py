"""Byte counts as polynomials in the sizes of a model and a batch. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from math import prod

Monomial = tuple[str, ...]
"""Its factors, sorted; one that occurs twice is a square, none is the constant."""

Sizes = Mapping[str, float]
"""The value of each symbol."""


class Polynomial:
    """A sum of products of symbols with rational coefficients; immutable.

    As text it reads `4 batch tokens hidden + 8 tokens`.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, Fraction | int] | None = None) -> None:
        """From coefficients by monomial; those of zero are dropped."""
        self.terms: dict[Monomial, Fraction] = {}
        for monomial, coefficient in (terms or {}).items():
            if coefficient:
                self.terms[tuple(sorted(monomial))] = Fraction(coefficient)

    @classmethod
    def parse(cls, text: str) -> Polynomial:
        """The polynomial that `str` gave as text.

        Raises:
            ValueError: it is no such text.
        """
        return _parsed(text)

    def times(self, symbol: str) -> Polynomial:
        """The product with a symbol."""
        return Polynomial({(*monomial, symbol): coefficient for monomial, coefficient in self.terms.items()})

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        parts = [" ".join((str(coefficient), *monomial)) for monomial, coefficient in sorted(self.terms.items())]
        return " + ".join(parts).replace("+ -", "- ")

    def __repr__(self) -> str:
        return f"Polynomial.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            terms[monomial] = terms.get(monomial, Fraction(0)) + coefficient
        return Polynomial(terms)

    def __mul__(self, factor: Fraction | int) -> Polynomial:
        return Polynomial({monomial: coefficient * factor for monomial, coefficient in self.terms.items()})

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + other * -1

    def value(self, sizes: Sizes) -> float:
        """Its value where the symbols have these sizes."""
        return sum(float(c) * prod(sizes[symbol] for symbol in monomial) for monomial, c in self.terms.items())


@cache
def _parsed(text: str) -> Polynomial:
    """The same object for the same text: laws have most polynomials in common."""
    terms: dict[Monomial, Fraction] = {}
    for part in text.replace("- ", "+ -").split("+"):
        if part.strip():
            coefficient, *factors = part.split()
            monomial = tuple(sorted(factors))
            terms[monomial] = terms.get(monomial, Fraction(0)) + Fraction(coefficient)
    return Polynomial(terms)
