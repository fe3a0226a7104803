"""What accelerators can do at best. Must not import torch.

Peak floating-point operations a second of dense matrix products with float32 accumulation, by the name that the driver
reports. Vendors also print figures for structured sparsity, twice as high, and GeForce cards have twice as high ones
with float16 accumulation; training uses neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TERA = 10**12


@dataclass(frozen=True)
class Peak:
    """Peak rates of one device, in units of 10^12 floating-point operations a second; None where it has no such units.

    Attributes:
        pattern: regular expression of the driver's whole name for the device.
        half: bfloat16 and float16 products; float16 alone if `bfloat16` is false.
        tf32: float32 products on tensor cores, with inputs rounded to TensorFloat-32.
        fp32: float32 products.
        source: where the vendor prints them.
        bfloat16: the device multiplies bfloat16 matrices.
    """

    pattern: str
    half: float
    tf32: float | None
    fp32: float
    source: str
    bfloat16: bool = True


_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"

PEAKS = (
    Peak(r"NVIDIA B200", 2250, 1125, 75, "NVIDIA HGX B200 datasheet, an eighth of the board"),
    Peak(r"NVIDIA (H200|GH200 (480GB|144G HBM3e?))", 989.5, 494.7, 66.9, "NVIDIA H200 and GH200 datasheets"),
    Peak(r"NVIDIA H200 NVL", 835.5, 417.5, 60.0, "NVIDIA H200 Tensor Core GPU datasheet"),
    Peak(r"NVIDIA H[18]00( 80GB HBM[23]e?)?", 989.5, 494.7, 66.9, _H100),
    Peak(r"NVIDIA H100 PCIe", 756.5, 378.0, 51.2, _H100 + ", first edition"),
    Peak(r"NVIDIA H100 NVL", 835.5, 417.5, 60.0, _H100),
    Peak(r"(NVIDIA )?A[18]00(-SXM4-|-PCIE-| )[48]0GB( PCIe)?", 312, 156, 19.5, "NVIDIA A100 datasheet"),
    Peak(r"NVIDIA A40", 149.7, 74.8, 37.4, "NVIDIA A40 datasheet"),
    Peak(r"NVIDIA A30", 165, 82, 10.3, "NVIDIA A30 datasheet"),
    Peak(r"NVIDIA A10", 125, 62.5, 31.2, "NVIDIA A10 datasheet"),
    Peak(r"NVIDIA L40S", 362.05, 183, 91.6, "NVIDIA L40S datasheet"),
    Peak(r"NVIDIA L40", 181.05, 90.5, 90.5, "NVIDIA L40 datasheet"),
    Peak(r"NVIDIA L4", 121, 60, 30.3, "NVIDIA L4 datasheet, half of the figures with sparsity"),
    Peak(r"NVIDIA RTX A6000", 154.8, 77.4, 38.7, _GA102),
    Peak(
        r"NVIDIA RTX 6000 Ada Generation",
        364.2,
        182.1,
        91.1,
        _ADA + " (professional)",
    ),
    Peak(r"NVIDIA GeForce RTX 3080", 59.5, 29.8, 29.8, _GA102),
    Peak(r"NVIDIA GeForce RTX 3090", 71.0, 35.6, 35.6, _GA102),
    Peak(r"NVIDIA GeForce RTX 4080", 97.5, 48.7, 48.7, _ADA),
    Peak(r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, _ADA),
    Peak(r"NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8, _BLACKWELL),
    Peak(r"Tesla V100-(SXM2|SXM3)-(16|32)GB(-LS)?", 125, None, 15.7, "NVIDIA V100 datasheet", bfloat16=False),
    Peak(r"Tesla V100-PCIE-(16|32)GB", 112, None, 14, "NVIDIA V100 datasheet", bfloat16=False),
    Peak(r"Tesla T4", 65, None, 8.1, "NVIDIA T4 datasheet", bfloat16=False),
    Peak(r"AMD Instinct MI300X( OAM)?", 1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
)
"""Names must match as a whole, so that slices of a device (MIG) and laptop versions of a card stay unknown."""


def peak_flops(device_name: str, dtype: str, *, tf32: bool = False) -> float | None:
    """Peak floating-point operations a second of one device; None where this table has none.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the products: `bfloat16`, `float16` or `float32`.
        tf32: float32 products may run on TensorFloat-32 units (`torch.set_float32_matmul_precision` above `highest`).
    """
    for peak in PEAKS:
        if re.fullmatch(peak.pattern, device_name):
            if dtype == "float32":
                rate = peak.tf32 if tf32 and peak.tf32 is not None else peak.fp32
            elif dtype == "float16" or (dtype == "bfloat16" and peak.bfloat16):
                rate = peak.half
            else:
                return None
            return rate * TERA
    return None
