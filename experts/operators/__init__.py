"""The operators of torch that compiled layers use; see `experts.compiled`."""
