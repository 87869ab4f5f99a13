"""The space of trials that `moebench parity` searches. Nothing here imports torch: the supervisor plans with it."""
