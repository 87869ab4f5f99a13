"""How the ranks of several nodes are started: what torch's launcher makes of moebench's arguments."""

import pytest

from moebench.run.workers.local import Meeting


@pytest.mark.parametrize(("host", "endpoint"), [("10.0.0.1", "10.0.0.1:29500"), ("fd00::1", "[fd00::1]:29500")])
def test_torchs_launcher_understands_the_meeting(host, endpoint):
    from torch.distributed.run import config_from_args, parse_args

    meeting = Meeting(num_nodes=2, host=host, port=29500, here=False, own="10.0.0.2", name="n")
    config, _, _ = config_from_args(parse_args([*meeting.arguments, "--nproc-per-node=8", "-m", "some.module"]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", endpoint, "n")
    assert config.rdzv_configs["is_host"] == "false"
    assert config.local_addr == "10.0.0.2"
    assert config.max_restarts == 0, "a group that has lost a rank ends"
