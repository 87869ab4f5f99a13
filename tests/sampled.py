"""Make the sample of captured routing that ships in suites/: `python -m tests.sampled`.

No model was run. The routing is drawn, so that it looks like the routing of a trained model: a few experts of each
layer are popular, the text's topic changes every 128 tokens and moves the choices of all its tokens, and deeper layers
follow the topic more. Three layers on two ranks, 32 experts, 4 a token.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parents[1] / "suites" / "sample-routing.npz"
LAYERS, RANKS, NUM_TOKENS, NUM_EXPERTS, TOP_K, TOPIC_TOKENS = (0, 12, 23), 2, 2048, 32, 4, 128


def sample() -> dict[str, NDArray[np.uint8]]:
    """Return the indices [tokens, K] by the name of their layer and rank. RandomState draws the same for ever."""
    arrays = {}
    for depth, layer in enumerate(LAYERS):
        popularity_E = 0.6 * np.random.RandomState(layer).standard_normal(NUM_EXPERTS)
        for rank in range(RANKS):
            drawn = np.random.RandomState(1000 * layer + rank + 1)
            topic_SE = (0.5 + 0.5 * depth) * drawn.standard_normal((NUM_TOKENS // TOPIC_TOKENS, NUM_EXPERTS))
            noise_TE = drawn.gumbel(size=(NUM_TOKENS, NUM_EXPERTS))
            scores_TE = popularity_E + topic_SE.repeat(TOPIC_TOKENS, axis=0) + noise_TE
            arrays[f"layer{layer}_rank{rank}"] = np.argsort(-scores_TE, axis=1)[:, :TOP_K].astype(np.uint8)
    return arrays


if __name__ == "__main__":
    np.savez_compressed(FILE, **sample())  # type: ignore[arg-type]
