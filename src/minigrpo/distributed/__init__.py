"""Several processes, the ranks, train one run: how they are started, what they exchange, how a lost one is
noticed."""
