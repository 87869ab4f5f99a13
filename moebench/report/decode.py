"""Say which rows are about decoding, where inference engines replay a layer from a CUDA graph."""

import pandas as pd

#: In a step of decoding, each sequence has one token. Few engines decode more sequences than this on one rank.
MOST_TOKENS = 256


def is_decode(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows are forward passes of so few tokens that they may be a step of decoding."""
    return rows["mode"].eq("forward") & rows["num_tokens"].le(MOST_TOKENS)


def graph_times(rows: pd.DataFrame) -> "pd.Series[float]":
    """Return the time of a replayed CUDA graph in ms of each row that is about decoding; null in all other rows."""
    return rows["graph_time_ms"].where(is_decode(rows)).astype("float64")
