"""Runs what users built with other libraries inside our chains, without a rewrite."""

from revlib.flows.adapters.freia import from_freia
from revlib.flows.adapters.nflows import from_nflows
from revlib.flows.adapters.normflows import from_normflows

__all__ = ["from_freia", "from_nflows", "from_normflows"]
