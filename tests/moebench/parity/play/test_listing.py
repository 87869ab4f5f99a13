"""The lines that are printed for a counterexample show the fault in a process in which nobody can import moebench."""

import ast
from dataclasses import replace

import pytest
import torch

from experts.config import DTYPES
from moebench.parity.play.listing import listing
from moebench.parity.play.play import Play
from moebench.parity.play.player import Stage
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import moe_config
from tests.moebench import faultbench

TRIAL = Trial(
    num_tokens=5, n_routed_experts=3, n_activated_experts=2, dim=8, moe_inter_dim=8, expert_bias=True, seed=1
)  # fmt: skip
#: Fault -> the fields of a case that shows it. The steps are of every kind.
CASES = {
    "DroppedToken": {"steps": ("call:no_grad",)},
    "DetachedRoutingWeight": {"steps": ("call", "backward")},
    "ScaledGradOfOneExpert": {"steps": ("call", "tokens:other", "call", "backward", "backward")},
    "MaskByMultiply": {"steps": ("call",), "mask": "some", "num_tokens": 15},
    "F32ParamsBf16X": {"dtype": "bfloat16", "param_dtype": "float32"},
    "XColumnMajor": {"steps": ("call",), "x_layout": "columns"},
    "FrozenGetsGrad": {"wanted": "x"},
    "ChangesX": {"steps": ("call:no_grad",), "mask": "some", "num_tokens": 15},
    "OutputReusedNoGrad": {"steps": ("call:no_grad", "tokens:other", "call:no_grad")},
    "EvalNoBias": {"steps": ("eval", "call:no_grad")},
    "AutocastWeights": {"steps": ("call:autocast", "backward")},
    "SavedThenFilled": {"steps": ("call:hooks", "backward")},
    "CheckpointMicrobatch": {"steps": ("call:checkpoint", "backward")},
    "RetainSpent": {"steps": ("call", "backward:twice")},
    "CacheByVersion": {"steps": ("call", "update:data", "call:no_grad")},
    "CacheReplaced": {"steps": ("call", "update:replace", "call")},
    "CacheDeepcopy": {"steps": ("copy", "update", "call")},
    "CacheAssign": {"steps": ("call", "load:assign", "call")},
    "LoadsBf16Bits": {"steps": ("load:dtype", "call")},
    "LoadAliases": {"steps": ("load", "update")},
    "LoadsUnexpected": {"steps": ("strict",)},
    "TwentiethBackward": {"steps": ("repeat",)},
    "UninitialisedOutput": {"mask": "some", "num_tokens": 15, "memory": "poisoned"},
}


def lines_of(fault):
    kind, trial = faultbench.kind_of(fault), replace(TRIAL, **CASES[fault])
    play = Play(
        trial, Stage(lambda one: kind(moe_config(one.case).with_dtype(DTYPES[one.params])), torch.device("cpu"))
    )
    assert not play.run().passed
    return listing(faultbench.FAULTS[fault], play)


#: Runs each listing of a dict in a namespace of its own, and prints how it ends.
RUN_ALL = """
import torch
for fault, lines in LISTINGS.items():
    try:
        exec("\\n".join(lines), {})
        print(fault, "passed")
    except BaseException as error:
        print(fault, type(error).__name__)
    torch.use_deterministic_algorithms(False)
"""


@pytest.fixture(scope="module")
def endings():
    """Run the lines of every case in one process, and return how each ended."""
    listings = {fault: lines_of(fault) for fault in CASES}
    done = faultbench.run_lines([f"LISTINGS = {listings!r}", RUN_ALL])
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("fault", CASES)
def test_the_lines_show_the_fault_without_moebench(endings, fault):
    assert endings[fault] == "AssertionError"


def test_a_process_ends_with_the_assertion():
    done = faultbench.run_lines(lines_of("DroppedToken"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("AssertionError: ")


def test_the_lines_name_the_layer_and_end_with_the_assertion():
    lines = lines_of("DroppedToken")
    tree = ast.parse("\n".join(lines))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"copy", "torch", "torch.utils.checkpoint"}
    assert any("from faulty import DroppedToken as Layer" in line for line in lines)
    assert isinstance(tree.body[-1], ast.Assert)
    assert len(lines) <= 25


def test_a_built_in_backend_is_built_by_the_registry():
    play = Play(TRIAL, Stage(lambda one: faultbench.kind_of("DroppedToken")(moe_config(one.case)), torch.device("cpu")))
    play.run()
    assert "Layer = get_backend('torch_mm').build" in "; ".join(listing("torch_mm", play))


def test_a_right_layer_passes_the_lines_of_a_wrong_one():
    lines = [line.replace("DroppedToken", "GroupedExperts").replace("from faulty", "from experts") for line in
             lines_of("DroppedToken")]  # fmt: skip
    done = faultbench.run_lines(lines)
    assert done.returncode == 0, done.stderr
