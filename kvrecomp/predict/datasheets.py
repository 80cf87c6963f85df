"""Machines by their data sheets: peak rates, which real machines do not reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """Device memory in 1e9 bytes, and peak rates a second: bytes over the link in one direction, dense 16-bit
    floating-point operations with 32-bit sums, bytes of device memory."""

    device: str
    memory_gb: float
    link: float
    matmul: float
    memory_rate: float
    source: str


# PCIe: 16 lanes of 8, 16 and 32 GT/s (generations 3, 4, 5) with 128b/130b coding carry 15.75, 31.5 and 63.0 GB/s each
# way (PCI Express Base Specification). KVPR counts 32 GB/s for generation 4, and so does its row here.
DATASHEETS = {
    "a100": Datasheet(
        "NVIDIA A100-PCIE-40GB", 40, 32e9, 312e12, 1555e9,
        "NVIDIA A100 Tensor Core GPU data sheet (40 GB PCIe); link: PCIe 4.0 x16 as KVPR counts it",
    ),
    "rtx5000": Datasheet(
        "Quadro RTX 5000", 16, 15.75e9, 89.2e12, 448e9,
        "NVIDIA Quadro RTX 5000 data sheet; link: PCIe 3.0 x16, the rate of the PCIe 4.0 x8 that KVPR says it has",
    ),
    "rtx4090": Datasheet(
        "NVIDIA GeForce RTX 4090", 24, 31.5e9, 165.2e12, 1008e9,
        "NVIDIA Ada GPU Architecture white paper, table of GeForce RTX 4090; link: PCIe 4.0 x16",
    ),
    "t4": Datasheet(
        "Tesla T4", 16, 15.75e9, 65e12, 320e9,
        "NVIDIA T4 Tensor Core GPU data sheet; link: PCIe 3.0 x16",
    ),
    "h100": Datasheet(
        "NVIDIA H100 80GB HBM3", 80, 63e9, 989.4e12, 3350e9,
        "NVIDIA H100 Tensor Core GPU data sheet (SXM, without sparsity); link: PCIe 5.0 x16",
    ),
    "h200": Datasheet(
        "NVIDIA H200", 141, 63e9, 989.4e12, 4800e9,
        "NVIDIA H200 Tensor Core GPU data sheet (SXM, without sparsity); link: PCIe 5.0 x16",
    ),
    "gh200": Datasheet(
        "NVIDIA GH200 480GB", 96, 450e9, 989.4e12, 4000e9,
        "NVIDIA GH200 Grace Hopper Superchip data sheet (96 GB HBM3); link: NVLink-C2C, 900 GB/s in both directions",
    ),
}  # fmt: skip
