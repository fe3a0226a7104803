"""What accelerators have and can do at best. Must not import torch.

Figures are the vendors'. Rates are of dense matrix products with float32 accumulation: vendors also print figures for
structured sparsity, twice as high, and GeForce cards have twice as high ones with float16 accumulation; training uses
neither. Vendors add up both directions of a link; here a rate is that of one direction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TERA = 10**12
GIGA = 10**9
GIB = 2**30

DRIVER_SHARE = 0.02
"""Part of the memory that the driver keeps, rounded up: what torch's out-of-memory messages call the total capacity is
79.1 GiB of 80, 139.8 of 141, 23.6 of 24 and, after error correction, 44.4 of 45 and 14.7 of 15."""

ECC_SHARE = 1 / 16
"""Part of GDDR memory that holds the codes of error correction where that is on; HBM has room of its own for them."""


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: for people.
        pattern: regular expression of the driver's whole name for the device.
        memory_bytes: that the card has.
        memory_bandwidth: of it, in bytes a second.
        half: bfloat16 and float16 products, in floating-point operations a second; float16 alone if `bfloat16` is
            false.
        tf32: float32 products on tensor cores, with inputs rounded to TensorFloat-32; None where there are none.
        fp32: float32 products.
        host_link: between host and device, in bytes a second and direction.
        peer_link: between one device and all others of its machine, in bytes a second and direction: NVLink or Infinity
            Fabric where the board has it, else `host_link`. Bridges, which are sold apart, do not count.
        architecture: CUDA's compute capability, or the name of an AMD architecture; empty for a processor.
        source: where the vendor prints the figures.
        aliases: further names that people use.
        bfloat16: the device multiplies bfloat16 matrices.
        ecc: error correction is on unless it is turned off, and takes `ECC_SHARE` of the memory.
        seen_bytes: memory that programs see, where it is known from the driver.
    """

    name: str
    pattern: str
    memory_bytes: int
    memory_bandwidth: float
    half: float
    tf32: float | None
    fp32: float
    host_link: float
    peer_link: float
    architecture: str
    source: str
    aliases: tuple[str, ...] = ()
    bfloat16: bool = True
    ecc: bool = False
    seen_bytes: int | None = None

    @property
    def visible_bytes(self) -> int:
        """Memory that programs see: what the driver says, or an estimate from what the card has."""
        if self.seen_bytes is not None:
            return self.seen_bytes
        return int(self.memory_bytes * (1 - DRIVER_SHARE) * (1 - ECC_SHARE if self.ecc else 1))

    def peak(self, dtype: str, *, tf32: bool = False) -> float | None:
        """Peak floating-point operations a second; None for a dtype without such products.

        Args:
            dtype: of the products: `bfloat16`, `float16` or `float32`.
            tf32: float32 products may run on TensorFloat-32 units.
        """
        if dtype == "float32":
            return self.tf32 if tf32 and self.tf32 is not None else self.fp32
        if dtype == "float16" or (dtype == "bfloat16" and self.bfloat16):
            return self.half
        return None


def _row(
    name: str,
    pattern: str,
    gib: float,
    bandwidth: float,
    peaks: tuple[float, float | None, float],
    links: tuple[float, float],
    architecture: str,
    source: str,
    *aliases: str,
    bfloat16: bool = True,
    ecc: bool = False,
) -> Device:
    """From GiB, GB/s, 10^12 operations a second of half, tf32 and fp32, and GB/s of links to the host and to peers."""
    half, tf32, fp32 = peaks
    return Device(
        name=name,
        pattern=pattern,
        memory_bytes=round(gib * GIB),
        memory_bandwidth=bandwidth * GIGA,
        half=half * TERA,
        tf32=None if tf32 is None else tf32 * TERA,
        fp32=fp32 * TERA,
        host_link=links[0] * GIGA,
        peer_link=links[1] * GIGA,
        architecture=architecture,
        source=source,
        aliases=aliases,
        bfloat16=bfloat16,
        ecc=ecc,
    )


_A100 = "NVIDIA A100 datasheet"
_A800 = "NVIDIA A100 datasheet; NVLink 400 GB/s: Reuters, 8 November 2022"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet"
_H800 = "NVIDIA H100 Tensor Core GPU datasheet; NVLink 400 GB/s: arXiv 2505.09343, section 2"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet"
_B200 = "NVIDIA HGX B200 and DGX B200 datasheets, an eighth of the board"
_V100 = "NVIDIA V100 datasheet"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
_MI300X = "AMD Instinct MI300X data sheet"

_HOPPER = (989.5, 494.7, 66.9)
_HOPPER_NVL = (835.5, 417.5, 60.0)
_GA100 = (312, 156, 19.5)
_VOLTA = (125, None, 15.7)
_VOLTA_PCIE = (112, None, 14)

_PCIE3 = (16, 16)
_PCIE4 = (32, 32)
_PCIE5 = (64, 64)

DEVICES = (
    _row("B200", r"NVIDIA B200", 180, 8000, (2250, 1125, 75), (64, 900), "10.0", _B200, "B200 SXM"),
    _row("H200", r"NVIDIA H200", 141, 4800, _HOPPER, (64, 450), "9.0", _H200, "H200 SXM"),
    _row("H200 NVL", r"NVIDIA H200 NVL", 141, 4800, _HOPPER_NVL, _PCIE5, "9.0", _H200),
    _row("GH200 144GB", r"NVIDIA GH200 144G HBM3e?", 144, 4900, _HOPPER, (450, 450), "9.0", _GH200),
    _row("GH200 96GB", r"NVIDIA GH200 480GB", 96, 4000, _HOPPER, (450, 450), "9.0", _GH200, "GH200", "GH200 480GB"),
    _row("H100", r"NVIDIA H100( 80GB HBM[23]e?)?", 80, 3350, _HOPPER, (64, 450), "9.0", _H100, "H100 SXM", "H100 80GB"),
    _row("H100 NVL", r"NVIDIA H100 NVL", 94, 3900, _HOPPER_NVL, _PCIE5, "9.0", _H100, "H100 94GB"),
    _row("H100 PCIe", r"NVIDIA H100 PCIe", 80, 2000, (756.5, 378.0, 51.2), _PCIE5, "9.0", _H100 + ", first edition"),
    _row("H800", r"NVIDIA H800( 80GB HBM[23]e?)?", 80, 3350, _HOPPER, (64, 200), "9.0", _H800, "H800 SXM"),
    _row("A100 80GB", r"(NVIDIA )?A100-SXM4-80GB", 80, 2039, _GA100, (32, 300), "8.0", _A100, "A100", "A100 SXM"),
    _row("A100 40GB", r"(NVIDIA )?A100-SXM4-40GB", 40, 1555, _GA100, (32, 300), "8.0", _A100),
    _row(
        "A100 PCIe 80GB", r"(NVIDIA )?A100(-PCIE-80GB| 80GB PCIe)", 80, 1935, _GA100, _PCIE4, "8.0", _A100, "A100 PCIe"
    ),
    _row("A100 PCIe 40GB", r"(NVIDIA )?A100(-PCIE-40GB| 40GB PCIe)", 40, 1555, _GA100, _PCIE4, "8.0", _A100),
    _row("A800 80GB", r"(NVIDIA )?A800-SXM4-80GB", 80, 2039, _GA100, (32, 200), "8.0", _A800, "A800", "A800 SXM"),
    _row("A800 40GB", r"(NVIDIA )?A800-SXM4-40GB", 40, 1555, _GA100, (32, 200), "8.0", _A800),
    _row(
        "A800 PCIe 80GB", r"(NVIDIA )?A800(-PCIE-80GB| 80GB PCIe)", 80, 1935, _GA100, _PCIE4, "8.0", _A800, "A800 PCIe"
    ),
    _row("A800 PCIe 40GB", r"(NVIDIA )?A800(-PCIE-40GB| 40GB PCIe)", 40, 1555, _GA100, _PCIE4, "8.0", _A800),
    _row("A40", r"NVIDIA A40", 48, 696, (149.7, 74.8, 37.4), _PCIE4, "8.6", "NVIDIA A40 datasheet", ecc=True),
    _row("A30", r"NVIDIA A30", 24, 933, (165, 82, 10.3), _PCIE4, "8.0", "NVIDIA A30 datasheet"),
    _row("A10", r"NVIDIA A10", 24, 600, (125, 62.5, 31.2), _PCIE4, "8.6", "NVIDIA A10 datasheet", ecc=True),
    _row("L40S", r"NVIDIA L40S", 48, 864, (362.05, 183, 91.6), _PCIE4, "8.9", "NVIDIA L40S datasheet", ecc=True),
    _row("L40", r"NVIDIA L40", 48, 864, (181.05, 90.5, 90.5), _PCIE4, "8.9", "NVIDIA L40 datasheet", ecc=True),
    _row(
        "L4",
        r"NVIDIA L4",
        24,
        300,
        (121, 60, 30.3),
        _PCIE4,
        "8.9",
        "NVIDIA L4 datasheet, half of the rates with sparsity",
        ecc=True,
    ),
    _row("RTX A6000", r"NVIDIA RTX A6000", 48, 768, (154.8, 77.4, 38.7), _PCIE4, "8.6", _GA102, "A6000"),
    _row(
        "RTX 6000 Ada",
        r"NVIDIA RTX 6000 Ada Generation",
        48,
        960,
        (364.2, 182.1, 91.1),
        _PCIE4,
        "8.9",
        _ADA + " (professional)",
        "6000 Ada",
    ),
    _row("RTX 3080", r"NVIDIA GeForce RTX 3080", 10, 760, (59.5, 29.8, 29.8), _PCIE4, "8.6", _GA102, "3080"),
    _row("RTX 3090", r"NVIDIA GeForce RTX 3090", 24, 936, (71.0, 35.6, 35.6), _PCIE4, "8.6", _GA102, "3090"),
    _row("RTX 4080", r"NVIDIA GeForce RTX 4080", 16, 716.8, (97.5, 48.7, 48.7), _PCIE4, "8.9", _ADA, "4080"),
    _row("RTX 4090", r"NVIDIA GeForce RTX 4090", 24, 1008, (165.2, 82.6, 82.6), _PCIE4, "8.9", _ADA, "4090"),
    _row("RTX 5090", r"NVIDIA GeForce RTX 5090", 32, 1792, (209.5, 104.8, 104.8), _PCIE5, "12.0", _BLACKWELL, "5090"),
    _row("V100 16GB", r"Tesla V100-SXM[23]-16GB(-LS)?", 16, 900, _VOLTA, (16, 150), "7.0", _V100, bfloat16=False),
    _row(
        "V100 32GB",
        r"Tesla V100-SXM[23]-32GB(-LS)?",
        32,
        900,
        _VOLTA,
        (16, 150),
        "7.0",
        _V100,
        "V100",
        "V100 SXM",
        bfloat16=False,
    ),
    _row("V100 PCIe 16GB", r"Tesla V100-PCIE-16GB", 16, 900, _VOLTA_PCIE, _PCIE3, "7.0", _V100, bfloat16=False),
    _row("V100 PCIe 32GB", r"Tesla V100-PCIE-32GB", 32, 900, _VOLTA_PCIE, _PCIE3, "7.0", _V100, bfloat16=False),
    _row("T4", r"Tesla T4", 16, 300, (65, None, 8.1), _PCIE3, "7.5", "NVIDIA T4 datasheet", bfloat16=False, ecc=True),
    _row("MI300X", r"AMD Instinct MI300X( OAM)?", 192, 5300, (1307.4, 653.7, 163.4), (64, 448), "gfx942", _MI300X),
)
"""Patterns match whole names only, so that slices of a device (MIG) and laptop versions of a card stay unknown."""


def known_device(device_name: str) -> Device | None:
    """The device of that name; None where this table has none.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
    """
    return next((device for device in DEVICES if re.fullmatch(device.pattern, device_name)), None)


def peak_flops(device_name: str, dtype: str, *, tf32: bool = False) -> float | None:
    """Peak floating-point operations a second of one device; None where this table has none.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the products: `bfloat16`, `float16` or `float32`.
        tf32: float32 products may run on TensorFloat-32 units (`torch.set_float32_matmul_precision` above `highest`).
    """
    device = known_device(device_name)
    return None if device is None else device.peak(dtype, tf32=tf32)
