"""Several processes, the ranks, train one run: how they join, what they exchange, how a lost one is noticed."""
