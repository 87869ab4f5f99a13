"""Run the study bandwidth, which measures each call for a hundredth of a second here."""

from moebench.measure.studies import bandwidth, run
from moebench.measure.timing import TimingPolicy

if __name__ == "__main__":
    TimingPolicy.default = lambda device: TimingPolicy(interval_target=0.9, time_cap_s=0.01)
    run(bandwidth.main, "moebench.measure.studies.bandwidth")
