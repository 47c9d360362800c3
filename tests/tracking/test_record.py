"""What a record says of the machine."""

from __future__ import annotations

import torch

from rose_exp.tracking.record import device_name


def test_a_gpu_is_called_by_its_name_and_not_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert device_name(torch.device("cuda:1")) == device_name(torch.device("cuda")) == "cuda: H100"
    assert device_name(torch.device("cpu")).startswith("cpu: ")
