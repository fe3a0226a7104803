"""What fits into a budget, how fast it goes, and what to change: memory ledger, time model, search, report."""
