import re

import pytest

from framework.hardware import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", False, 312),
        ("NVIDIA A100-SXM4-40GB", "float32", False, 19.5),
        ("NVIDIA A100 80GB PCIe", "float32", True, 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", False, 989.5),
        ("NVIDIA H100 PCIe", "float16", False, 756.5),
        ("NVIDIA H200", "float32", True, 494.7),
        ("NVIDIA L40S", "bfloat16", False, 362.05),
        ("NVIDIA L40", "bfloat16", False, 181.05),
        ("NVIDIA L4", "bfloat16", False, 121),
        ("NVIDIA A10", "bfloat16", False, 125),
        ("NVIDIA GeForce RTX 3090", "bfloat16", False, 71),
        ("NVIDIA GeForce RTX 4090", "float16", False, 165.2),
        ("Tesla V100-SXM2-16GB", "float16", False, 125),
        ("Tesla T4", "float32", True, 8.1),
    ],
)
def test_peaks_by_the_drivers_name(name, dtype, tf32, tera):
    assert peak_flops(name, dtype, tf32=tf32) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA A100X", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA A100-SXM4-80GB", "float64"),
        ("cpu", "float32"),
    ],
)
def test_what_is_not_in_the_table_is_unknown(name, dtype):
    assert peak_flops(name, dtype) is None


def test_every_row_is_one_device_with_a_source():
    names = [device.pattern for device in DEVICES]
    assert len(set(names)) == len(names)
    for device in DEVICES:
        re.compile(device.pattern)
        assert device.source
        assert device.fp32 <= (device.tf32 or device.half) <= device.half
