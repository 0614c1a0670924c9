"""The scheduler in simulated time, the ledger with real files, and the arithmetic of scale."""
