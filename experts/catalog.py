"""List every engine, built-in backend and dispatcher.

Importing this module does not import torch, so that a process without torch can plan a run. To add an engine, backend
or dispatcher, write its module and add an entry to `ENGINES`, `BACKENDS` or `DISPATCHERS`. The modules `registry`,
`engines`, `dispatchers` and `config` read these lists.
"""

import difflib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

Fp8Recipe = Literal["current", "delayed", "block", "mxfp8"]
#: The recipes of `triton_fp8`, which are not Transformer Engine's: as `block`, with float32 scales. The second one has
#: gradients of rows in E5M2. In the third one, the gradients of weights are not in FP8. In the fourth one, rows travel
#: between ranks in FP8.
OwnFp8Recipe = Literal["block_float32", "block_float32_e5m2", "block_float32_16bit_dw", "block_float32_rows"]
Fp8Gradients = Literal["e4m3", "e5m2"]
Save = Literal["memory", "time"]
#: Names of groups of backends. A sweep names a group as "@bf16".
Group = Literal[
    "bf16",
    "cpu",
    "save_time",
    "main_grad",
    "fp8",
    "own_fp8",
    "block_fp8",
    "cached",
    "mxfp8",
    "lora",
    "peers",
    "ep_peers",
]
Collective = Literal["all_gather", "all_to_all"]

#: Installed packages name further backends under this group of entry points.
ENTRY_POINT_GROUP = "experts.backends"

_FROM_SOURCE = "with nvcc: pip install 'setuptools>=77' ninja && pip install --no-build-isolation 'moebench[{}]'"

#: Importable name of a library -> how to install the library. `moebench doctor` prints this text, and reasons of
#: `Unsupported` contain it. CUDA extensions are built against the installed torch, so pip must not isolate their build.
#: Where moebench is installed, from a wheel or from a checkout, pip takes its extra from what is installed.
LIBRARIES: dict[str, str] = {
    "transformer_engine": _FROM_SOURCE.format("te"),
    "grouped_gemm": _FROM_SOURCE.format("gmm"),
    "deep_ep": "pip install 'moebench[deepep]'",
    "deep_gemm": "pip install 'moebench[deepgemm]' (with torch 2.11: sgl-deep-gemm==0.1.5), and nvcc",
    "torchao": "pip install torchao",
    "triton": "install a CUDA build of torch, which brings triton",
    "transformers": "pip install 'transformers>=5.17'",
    "nemo_automodel": "pip install nemo_automodel",
    "sonicmoe": "pip install sonic-moe (it needs Python 3.12 and CUDA 12.9, or later)",
}


def missing(library: str, error: Exception | None = None) -> str:
    """Return, in one line, why a library of `LIBRARIES` cannot be used and how to install the library.

    `error` is the exception that the library's import raised. If `error` is None, the text says that the library is not
    installed.
    """
    why = "is not installed" if error is None else f"does not import ({error})"
    return f"{library} {why}; {LIBRARIES[library]}"


@dataclass(frozen=True)
class EngineEntry:
    """One way to compute the experts of a rank.

    `library` is the key of `LIBRARIES` that the engine needs, or None if it needs none of these libraries.

    `stacked` is true if the engine computes on the stacked parameters; then `module` has an `ENGINE`. It is false if
    the engine is a layer that keeps its own weights.

    `counts_rows` is true if the host waits for the number of rows that this rank's experts get, and the engine computes
    only these rows. It is false if the engine allocates one row for every choice of every token that reaches the rank.

    `one_by_one` is true if the engine computes one expert after another and sums the results in float32, and autograd
    adds up the gradients.
    """

    name: str
    module: str
    library: str | None = None
    stacked: bool = True
    counts_rows: bool = False
    one_by_one: bool = False


@dataclass(frozen=True)
class Lora:
    """The size of low-rank adapters, and alpha: A @ B counts alpha / rank times."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class BackendEntry:
    """A named way to build an expert layer: an engine with its options, or a peer (another library's layer).

    `engine` is None for a peer. `cached` is true if the layer keeps quantised weights from call to call. `target` is
    the peer as `module:attribute`, and `library` is the key of `LIBRARIES` that the peer needs. Both are None if the
    backend is not a peer.

    `lora` is the size of the layer's adapters. It is None if the layer has no adapters and its weights are trained.

    `capability` is the least compute capability of the CUDA GPUs on which the backend runs, as (major, minor). It is
    None if the backend also runs on a CPU. `last_major` is the largest major number of it, or None if the backend also
    runs on later GPUs.

    A backend with `fp8_rows` runs only with the dispatchers that have this option.
    """

    name: str
    engine: EngineEntry | None = None
    groups: tuple[Group, ...] = ()
    fp8: Fp8Recipe | OwnFp8Recipe | None = None
    save: Save | None = None
    fp8_gradients: Fp8Gradients | None = None
    fp8_weight_gradients: bool | None = None
    fp8_rows: bool | None = None
    gradient_accumulation_fusion: bool = False
    cached: bool = False
    target: str | None = None
    library: str | None = None
    capability: tuple[int, int] | None = None
    last_major: int | None = None
    lora: Lora | None = None

    @property
    def te_fp8(self) -> Fp8Recipe | None:
        """The recipe as Transformer Engine knows it; None for another engine's recipe."""
        return self.fp8 if self.fp8 in ("current", "delayed", "block", "mxfp8") else None


@dataclass(frozen=True)
class DispatcherEntry:
    """One way to carry tokens between ranks.

    `module` has `make(group, config, **options)` and `unsupported(device, config)`. `options` names the fields of
    `BackendConfig` that the dispatcher takes, and `make` gets those that are set.

    `collective` is the collective that moves as many tokens as the dispatcher, so its speed bounds the dispatcher's
    speed. With "all_gather", every rank gets every token. With "all_to_all", a rank gets only the tokens that chose one
    of the rank's experts.

    `reserves_rows` is true if a rank has room for every token of every rank, in memory that all ranks can reach.
    """

    name: str
    module: str
    collective: Collective
    library: str | None = None
    options: tuple[str, ...] = ()
    reserves_rows: bool = False


_LOOP = EngineEntry("loop", "experts.compute.loop", counts_rows=True, one_by_one=True)
_TORCH_MM = EngineEntry("torch_mm", "experts.compute.torch_mm")
_TORCH_MM_MXFP8 = EngineEntry("torch_mm_mxfp8", "experts.compute.torch_mm_mxfp8", library="torchao", counts_rows=True)
_TRITON = EngineEntry("triton", "experts.compute.triton", library="triton")
_TRITON_FP8 = EngineEntry("triton_fp8", "experts.compute.triton_fp8", library="triton")
_DEEP_GEMM_FP8 = EngineEntry("deep_gemm_fp8", "experts.compute.deep_gemm_fp8", library="deep_gemm")
_GMM = EngineEntry("gmm", "experts.compute.gmm", library="grouped_gemm", counts_rows=True)
_TE = EngineEntry("te", "experts.te.layer", library="transformer_engine", stacked=False, counts_rows=True)

#: The engines, in the order in which lists show them.
ENGINES = (_LOOP, _TORCH_MM, _TORCH_MM_MXFP8, _TRITON, _TRITON_FP8, _DEEP_GEMM_FP8, _GMM, _TE)
#: The name of the engine and of the backend that results are compared with.
REFERENCE = _LOOP.name
#: The adapters of the backends with adapters.
LORA = Lora(rank=16, alpha=32.0)

#: The built-in backends. Peers are listed here and are not entry points, so that a user can name a peer even where this
#: package is only on the path and not installed.
BACKENDS = (
    BackendEntry("loop", _LOOP, ("cpu",)),
    BackendEntry("torch_mm", _TORCH_MM, ("bf16", "cpu")),
    BackendEntry("torch_mm_mxfp8", _TORCH_MM_MXFP8, ("mxfp8",), fp8="mxfp8", capability=(10, 0)),
    BackendEntry("triton", _TRITON, ("bf16",), capability=(8, 0)),
    BackendEntry("triton_main_grad", _TRITON, ("main_grad",), gradient_accumulation_fusion=True, capability=(8, 0)),
    BackendEntry(
        "triton_fp8", _TRITON_FP8, ("fp8", "own_fp8", "block_fp8"), fp8="block_float32", cached=True, capability=(8, 9)
    ),
    BackendEntry(
        "triton_fp8_e5m2",
        _TRITON_FP8,
        ("own_fp8",),
        fp8="block_float32_e5m2",
        fp8_gradients="e5m2",
        cached=True,
        capability=(8, 9),
    ),
    BackendEntry(
        "triton_fp8_16bit_dw",
        _TRITON_FP8,
        ("own_fp8",),
        fp8="block_float32_16bit_dw",
        fp8_weight_gradients=False,
        cached=True,
        capability=(8, 9),
    ),
    BackendEntry(
        "triton_fp8_rows",
        _TRITON_FP8,
        ("own_fp8",),
        fp8="block_float32_rows",
        fp8_rows=True,
        cached=True,
        capability=(8, 9),
    ),
    BackendEntry(
        "deep_gemm_fp8",
        _DEEP_GEMM_FP8,
        ("block_fp8",),
        fp8="block_float32",
        cached=True,
        capability=(9, 0),
        last_major=9,
    ),
    BackendEntry("gmm", _GMM, ("bf16",), capability=(0, 0)),
    BackendEntry("torch_mm_save_time", _TORCH_MM, ("save_time",), save="time"),
    BackendEntry("gmm_save_time", _GMM, ("save_time",), save="time", capability=(0, 0)),
    BackendEntry("te", _TE, ("bf16",), capability=(7, 0)),
    BackendEntry("te_fp8_current", _TE, ("fp8",), fp8="current", capability=(8, 9)),
    BackendEntry("te_fp8_delayed", _TE, ("fp8",), fp8="delayed", capability=(8, 9)),
    BackendEntry("te_fp8_block", _TE, ("fp8",), fp8="block", capability=(8, 9)),
    BackendEntry("te_fp8_current_cached", _TE, ("cached",), fp8="current", cached=True, capability=(8, 9)),
    BackendEntry("te_fp8_block_cached", _TE, ("cached",), fp8="block", cached=True, capability=(8, 9)),
    BackendEntry("te_mxfp8", _TE, ("mxfp8",), fp8="mxfp8", capability=(10, 0)),
    BackendEntry("loop_lora", _LOOP, ("lora",), lora=LORA),
    BackendEntry("torch_mm_lora", _TORCH_MM, ("lora",), lora=LORA),
    BackendEntry("triton_lora", _TRITON, ("lora",), lora=LORA, capability=(8, 0)),
    BackendEntry(
        "peer_transformers",
        groups=("peers",),
        target="experts.peers.transformers_experts:TransformersExperts",
        library="transformers",
    ),
    BackendEntry(
        "peer_automodel_torch_mm",
        groups=("peers", "ep_peers"),
        target="experts.peers.nemo_automodel:AutoModelTorchMm",
        library="nemo_automodel",
    ),
    BackendEntry(
        "peer_automodel_te",
        groups=("ep_peers",),
        target="experts.peers.nemo_automodel:AutoModelTE",
        library="nemo_automodel",
        capability=(7, 0),
    ),
    BackendEntry(
        "peer_sonicmoe",
        groups=("peers",),
        target="experts.peers.sonicmoe:SonicMoE",
        library="sonicmoe",
        capability=(9, 0),
    ),
)

#: The dispatchers. A sweep that names no dispatcher takes the first dispatcher.
DISPATCHERS = (
    DispatcherEntry("allgather", "experts.dispatch.allgather", "all_gather", options=("equal_tokens",)),
    DispatcherEntry("alltoall", "experts.dispatch.alltoall", "all_to_all"),
    DispatcherEntry(
        "deepep", "experts.dispatch.deepep", "all_to_all", library="deep_ep", options=("num_sms", "fp8_rows")
    ),
    DispatcherEntry(
        "symm_mem",
        "experts.dispatch.symm_mem",
        "all_to_all",
        options=("max_tokens_per_rank", "capacity_factor", "fp8_rows"),
        reserves_rows=True,
    ),
)


def backend_names() -> tuple[str, ...]:
    """Return the names of the built-in backends, then of the installed third-party backends. Imports no backend."""
    built_in = [backend.name for backend in BACKENDS]
    installed = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return *built_in, *sorted(installed.difference(built_in))


def unknown(name: str) -> str | None:
    """Return, in one line, that no backend has this name; None if one has, or if the name is a `module:attribute`."""
    names = backend_names()
    if name in names or ":" in name:
        return None
    # BackendConfig accepts "torch" for the loop, but in results each backend has one name
    near = [REFERENCE] if name == "torch" else difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no backend {name!r}; {hint}the backends are {', '.join(names)}, or give module:attribute"
