"""Every engine, built-in backend and dispatcher, described in one place. No torch here.

Whoever plans a run reads this where torch cannot be imported; `registry`, `engines`, `dispatchers` and `config` read it
too. A new engine, backend or dispatcher is an entry here and a module of its own.
"""

from dataclasses import dataclass
from typing import Literal

Fp8Recipe = Literal["current", "delayed", "block", "mxfp8"]
Save = Literal["memory", "time"]
#: Backends that sweeps name together, as "@bf16".
Group = Literal["bf16", "cpu", "save_time", "fp8", "cached", "mxfp8", "peers"]
Collective = Literal["all_gather", "all_to_all"]

_FROM_SOURCE = (
    "in the checkout, with nvcc: pip install 'setuptools>=77' ninja && pip install --no-build-isolation -e '.[{}]'"
)

#: Importable name of a library -> how to get it. Extensions are built against the torch that is installed, so pip must
#: not isolate their build.
LIBRARIES: dict[str, str] = {
    "transformer_engine": _FROM_SOURCE.format("te"),
    "grouped_gemm": _FROM_SOURCE.format("gmm"),
    "deep_ep": "in the checkout: pip install -e '.[deepep]'",
    "torchao": "pip install torchao",
    "triton": "it comes with a CUDA build of torch",
    "transformers": "pip install 'transformers>=5.17'",
    "nemo_automodel": "pip install nemo_automodel",
    "sonicmoe": "pip install sonic-moe (Python 3.12 or later, CUDA 12.9 or later)",
}


@dataclass(frozen=True)
class Engine:
    """One way to compute the experts of a rank.

    `stacked`: it computes on the stacked parameters, and `module` has its `ENGINE`; else it is a layer with weights of
    its own. `counts_rows`: the host waits for the number of rows that this rank's experts get, and the engine computes
    on no others; the other engines have a row for every choice of every token that reaches the rank. `one_by_one`: it
    computes one expert after the other, sums them up in float32, and autograd adds up their gradients. `library`: a key
    of LIBRARIES.
    """

    name: str
    module: str
    library: str | None = None
    stacked: bool = True
    counts_rows: bool = False
    one_by_one: bool = False


@dataclass(frozen=True)
class Backend:
    """A named way to build an expert layer: an engine with its options, or a peer, another library's layer.

    `cached`: quantised weights are kept from call to call. `target` is where a peer is, as `module:attribute`, and
    `library` the key of LIBRARIES that it needs.
    """

    name: str
    engine: Engine | None = None
    groups: tuple[Group, ...] = ()
    fp8: Fp8Recipe | None = None
    save: Save | None = None
    cached: bool = False
    target: str | None = None
    library: str | None = None


@dataclass(frozen=True)
class Dispatcher:
    """One way to carry tokens between ranks. `module` has its `make(group, config)` and `unsupported(device, config)`.

    It cannot be faster than the raw `collective`. With "all_gather" every rank gets every token, with "all_to_all"
    those that chose one of its experts.
    """

    name: str
    module: str
    collective: Collective
    library: str | None = None


_LOOP = Engine("loop", "experts.compute.loop", counts_rows=True, one_by_one=True)
_TORCH_MM = Engine("torch_mm", "experts.compute.torch_mm")
_TORCH_MM_MXFP8 = Engine("torch_mm_mxfp8", "experts.compute.torch_mm_mxfp8", library="torchao", counts_rows=True)
_TRITON = Engine("triton", "experts.compute.triton", library="triton")
_GMM = Engine("gmm", "experts.compute.gmm", library="grouped_gemm", counts_rows=True)
_TE = Engine("te", "experts.te.layer", library="transformer_engine", stacked=False, counts_rows=True)

#: In the order in which users meet them.
ENGINES = (_LOOP, _TORCH_MM, _TORCH_MM_MXFP8, _TRITON, _GMM, _TE)
#: The engine, and the backend of its name, that others are compared with.
REFERENCE = _LOOP.name

#: Peers are listed here, not as entry points of our own, so that they are known wherever the package is on the path,
#: installed or not.
BACKENDS = (
    Backend("loop", _LOOP, ("cpu",)),
    Backend("torch_mm", _TORCH_MM, ("bf16", "cpu")),
    Backend("torch_mm_mxfp8", _TORCH_MM_MXFP8, ("mxfp8",), fp8="mxfp8"),
    Backend("triton", _TRITON, ("bf16",)),
    Backend("gmm", _GMM, ("bf16",)),
    Backend("torch_mm_save_time", _TORCH_MM, ("save_time",), save="time"),
    Backend("gmm_save_time", _GMM, ("save_time",), save="time"),
    Backend("te", _TE, ("bf16",)),
    Backend("te_fp8_current", _TE, ("fp8",), fp8="current"),
    Backend("te_fp8_delayed", _TE, ("fp8",), fp8="delayed"),
    Backend("te_fp8_block", _TE, ("fp8",), fp8="block"),
    Backend("te_fp8_current_cached", _TE, ("cached",), fp8="current", cached=True),
    Backend("te_fp8_block_cached", _TE, ("cached",), fp8="block", cached=True),
    Backend("te_mxfp8", _TE, ("mxfp8",), fp8="mxfp8"),
    Backend(
        "peer_transformers",
        groups=("peers",),
        target="experts.peers.transformers_experts:TransformersExperts",
        library="transformers",
    ),
    Backend(
        "peer_automodel_torch_mm",
        groups=("peers",),
        target="experts.peers.nemo_automodel:AutoModelTorchMm",
        library="nemo_automodel",
    ),
    Backend("peer_sonicmoe", groups=("peers",), target="experts.peers.sonicmoe:SonicMoE", library="sonicmoe"),
)

#: The first is what a sweep takes that names none.
DISPATCHERS = (
    Dispatcher("allgather", "experts.dispatch.allgather", "all_gather"),
    Dispatcher("alltoall", "experts.dispatch.alltoall", "all_to_all"),
    Dispatcher("deepep", "experts.dispatch.deepep", "all_to_all", library="deep_ep"),
)
