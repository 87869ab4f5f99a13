"""The script writes what a step does as lines of Python."""

from moebench.parity.play import draw
from moebench.parity.play.script import WIDTH, Script
from moebench.parity.space.trial import Trial

TRIAL = Trial(num_tokens=2, n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, expert_bias=True, seed=1)
ALL = draw.wanted(TRIAL, tuple(draw.shapes(TRIAL)))


def script(**fields):
    return Script(Trial(**{**vars(TRIAL), **fields}))


def test_statements_share_a_line_as_long_as_they_fit():
    one = script()
    one.add("a = 1", "b = 2")
    assert one.lines == ["a = 1; b = 2"]
    one.add("c = " + "1" * WIDTH)
    assert len(one.lines) == 2


def test_a_with_statement_stands_alone():
    one = script()
    one.add("a = 1", "with b: c()", "d = 2")
    assert one.lines == ["a = 1", "with b: c()", "d = 2"]


def test_a_closed_script_takes_no_more_lines():
    one = script()
    one.is_closed = True
    one.add("a = 1")
    one.repeat(0, 0, 5, with_backward=True)
    assert (one.lines, one.loop) == ([], None)


def test_a_layer_is_built_with_the_configuration_and_parameters_of_the_trial():
    one = script(expert_activation="quick_geglu", limit=3.0)
    one.build(0, one.trial, 0, ALL)
    text = "\n".join(one.lines)
    assert "layer0 = Layer(MoEConfig(" in text
    assert "expert_activation='quick_geglu'" in text
    assert "activation_limit=3.0" in text
    assert f"torch.manual_seed({draw.parameter_seed(TRIAL, 0)})" in text
    assert "requires_grad_" not in text


def test_only_wanted_parameters_require_a_gradient():
    one = script(wanted="down_projs")
    one.build(0, one.trial, 0, draw.wanted(one.trial, tuple(draw.shapes(one.trial))))
    assert "p.requires_grad_(n in ('down_projs',))" in "\n".join(one.lines)


def test_contexts_and_checkpoints_wrap_the_call():
    one = script()
    for number, how in enumerate(("no_grad", "inference", "autocast", "hooks", "checkpoint", "reentrant", "")):
        one.call(number, 0, [], how, ALL)
    text = "\n".join(one.lines)
    assert "with torch.no_grad(): y0 = layer0(x0, mask, w0, i)" in text
    assert "with torch.inference_mode(): y1 = " in text
    assert "with torch.autocast('cpu', torch.bfloat16): y2 = " in text
    assert "saved_tensors_hooks" in text
    assert "y4 = torch.utils.checkpoint.checkpoint(layer0, x4, mask, w4, i, use_reentrant=False)" in text
    assert "use_reentrant=True" in text
    assert "y6 = layer0(x6, mask, w6, i)" in text


def test_poisoned_memory_is_asked_for_once():
    one = script(memory="poisoned")
    one.call(0, 0, [], "", ALL)
    one.call(1, 0, [], "", ALL)
    assert "\n".join(one.lines).count("use_deterministic_algorithms") == 1


def test_backwards_are_numbered():
    one = script()
    assert [one.backward(0, retain_graph=True), one.backward(0, retain_graph=False)] == [0, 1]
    text = "\n".join(one.lines)
    assert "y0.backward(dy0, retain_graph=True)" in text
    assert "g1 = {'x': x0.grad, 'weights': w0.grad}" in text


def test_a_repeated_call_is_a_loop_in_which_the_assertion_stands():
    one = script()
    one.repeat([3, 4], 0, 230, with_backward=True)
    assert one.loop.startswith("for k in range(230): layer0.zero_grad(); x, mask, w, i, dy = (set3, set4)[k % 2]; y = ")
    assert one.repeated == (3, 4)
    assert one.lines == []
