"""Did a change make it slower, larger or wrong? Exact tests, gates, baselines, and comparisons of revisions."""
