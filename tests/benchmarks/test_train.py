"""The benchmark of training speed: what it says of a profile."""

import sys
from types import SimpleNamespace

from torch.autograd import DeviceType

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import train  # noqa: E402 - benchmarks/train.py


def event(name, start, end, device=DeviceType.CUDA, annotation=False):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_waits_of_the_device_are_told_by_what_came_after_them(capsys):
    events = [
        event("copy", 6000, 7000),
        event("add", 0, 2000),
        event("multiply", 1000, 4000),  # beside the one before, on another stream
        event("add", 7500, 8000),
        event("the optimizer's step", 0, 8000, annotation=True),
        event("aten::add", 0, 9000, DeviceType.CPU),
    ]
    train.print_gaps(events)
    whole, first, second = capsys.readouterr().out.splitlines()
    assert whole == "device: busy 5.5 ms of 8.0 ms in 4 kernels and copies"
    assert first.split() == "idle 2.00 ms in 1 waits for copy".split()
    assert second.split() == "idle 0.50 ms in 1 waits for add".split()
    train.print_gaps([event("aten::add", 0, 9, DeviceType.CPU)])
    assert capsys.readouterr().out == ""
