import os
import sys

import pytest

from moebench.machine import nvml

UUID = "GPU-00000000-0000-0000-0000-000000000001"


def test_fake_offers_nothing_that_pynvml_lacks(fake_nvml, monkeypatch):
    monkeypatch.delitem(sys.modules, "pynvml")
    import pynvml

    offered = {name for name in dir(fake_nvml) if name.lower().startswith("nvml")}
    assert len(offered) > 10
    assert offered <= set(dir(pynvml))
    assert [pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU] == [1, 2, 0]


def test_reason_names_are_those_of_pynvml(fake_nvml, monkeypatch):
    monkeypatch.delitem(sys.modules, "pynvml")
    import pynvml

    for bit, name in nvml.CLOCKS_EVENT_REASONS.items():
        constant = "nvmlClocksEventReason" + "".join(part.capitalize() for part in name.split("_"))
        assert getattr(pynvml, constant) == bit


def test_reads_every_field_in_the_units_of_its_name(fake_nvml):
    fake_nvml.add_gpu(UUID)
    assert nvml.read(UUID) == nvml.GpuReading(
        name="NVIDIA H200",
        uuid=UUID,
        memory_bytes=150_754_820_096,
        driver_version="580.159.03",
        power_limit_w=700.0,
        max_sm_clock_mhz=1980,
        max_memory_clock_mhz=3201,
        sm_clock_mhz=345,
        memory_clock_mhz=3200,
        power_w=77.5,
        temperature_c=31,
        throttle_reasons=("gpu_idle",),
        nvml_error=None,
    )


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0, ()),
        (0x004 | 0x040, ("sw_power_cap", "hw_thermal_slowdown")),
        (0x020 | 0x400, ("sw_thermal_slowdown", "0x400")),
        (0x600, ("0x600",)),
    ],
)
def test_reasons_are_named_and_unknown_bits_stay_visible(fake_nvml, bits, names):
    fake_nvml.add_gpu(UUID, reasons=bits)
    assert nvml.read(UUID).throttle_reasons == names


def test_a_query_that_is_not_supported_leaves_its_field_alone(fake_nvml):
    fake_nvml.add_gpu(UUID)
    whole = nvml.read(UUID)
    fake_nvml.unsupported = {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons"}
    assert nvml.read(UUID) == whole.model_copy(update={"power_w": None, "throttle_reasons": None})


@pytest.mark.parametrize("uuid", [UUID, "GPU-of-another-machine"])
def test_every_session_is_closed(fake_nvml, uuid):
    fake_nvml.add_gpu(UUID)
    nvml.read(uuid)
    nvml.read_all()
    assert fake_nvml.open == 0


def test_absence_is_a_value(fake_nvml, monkeypatch):
    assert nvml.read(UUID) == nvml.GpuReading(nvml_error="NVML: Not Found")
    fake_nvml.init_error = "NVML Shared Library Not Found"
    assert nvml.read(UUID) == nvml.GpuReading(nvml_error="NVML: NVML Shared Library Not Found")
    with pytest.raises(nvml.NvmlUnavailable, match="Shared Library"):
        nvml.read_all()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.read(UUID) == nvml.GpuReading(nvml_error="nvidia-ml-py is not installed")


def test_use_counts_other_processes_alone(fake_nvml):
    fake_nvml.add_gpu(UUID, pids=[os.getpid(), 4242], busy_percent=87)
    fake_nvml.add_gpu("GPU-2", pids=[])
    uses = [use for _, use in nvml.read_all()]
    assert uses == [
        nvml.GpuUse(other_pids=(4242,), busy_percent=87, capability=(9, 0)),
        nvml.GpuUse(other_pids=(), busy_percent=0, capability=(9, 0)),
    ]


def test_a_lost_gpu_is_listed_with_its_error(fake_nvml):
    fake_nvml.add_gpu(UUID)
    fake_nvml.unsupported = {"nvmlDeviceGetHandleByIndex"}
    assert nvml.read_all() == [(nvml.GpuReading(nvml_error="NVML: Not Supported"), nvml.GpuUse())]
