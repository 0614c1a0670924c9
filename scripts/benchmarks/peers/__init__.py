"""One script a peer, each run in the environment of its own that `scripts/bench-peers` makes."""
