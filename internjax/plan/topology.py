"""GPUs by name, and compile-only devices of as many of them as one likes.

No GPU and no driver is needed: XLA compiles against a description of the chip. Bandwidths are of
the data sheets; what is reached of them is a constant of `estimate`.
"""

from dataclasses import dataclass

import jax
from jax.experimental import topologies

from internjax.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU model in its usual node of eight.

    Fields:
      device_name, capability, sm_count, hbm_bytes, hbm_bandwidth, l2_bytes, clock_ghz,
        smem_per_sm, smem_per_block, fpus_per_sm: what XLA asks of a target, as a driver reports it
        (the public target descriptions of openxla/xla, xla/backends/gpu/target_config/specs).
      peak_bf16_flops: dense bf16 FLOP/s of the data sheet.
      nvlink_bandwidth: bytes/s to the other GPUs of the node, one direction.
      nic_bandwidth: bytes/s to other nodes, one direction; one GPU's share of the node's adapters.
      source: where the last three come from.
    """

    name: str
    device_name: str
    capability: tuple[int, int]
    sm_count: int
    hbm_bytes: int
    hbm_bandwidth: float
    l2_bytes: int
    clock_ghz: float
    smem_per_sm: int
    smem_per_block: int
    fpus_per_sm: int
    peak_bf16_flops: float
    nvlink_bandwidth: float
    nic_bandwidth: float
    source: str


_A100 = "NVIDIA A100 data sheet (312 TFLOPS, NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s"
_H100 = "NVIDIA H100 SXM data sheet (989 TFLOPS, NVLink 900 GB/s both ways); DGX H100: 8 x 400 Gb/s"
_H200 = "NVIDIA H200 SXM data sheet (989 TFLOPS, NVLink 900 GB/s both ways); DGX H200: 8 x 400 Gb/s"
_B200 = "NVIDIA HGX B200 data sheet (2.25 PFLOPS, NVLink 1.8 TB/s both ways); DGX: 8 x 400 Gb/s"
# fmt: off
_ALL = (
    Gpu("a100-40", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 42331013120, 1.5552e12, 41943040, 1.41,
        167936, 166912, 64, 312e12, 300e9, 25e9, _A100),
    Gpu("a100-80", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 85100068864, 2.03904e12, 41943040, 1.41,
        167936, 166912, 64, 312e12, 300e9, 25e9, _A100),
    Gpu("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 84942979072, 3.35232e12, 52428800, 1.98,
        233472, 232448, 128, 989e12, 450e9, 50e9, _H100),
    Gpu("h200", "NVIDIA H200", (9, 0), 132, 151397597184, 4.8e12, 52428800, 1.98,
        233472, 232448, 128, 989e12, 450e9, 50e9, _H200),
    Gpu("b200", "NVIDIA B200", (10, 0), 148, 191514411008, 7.67232e12, 132644864, 1.965,
        233472, 232448, 128, 2250e12, 900e9, 50e9, _B200),
)
# fmt: on
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _ALL}
MAX_GPUS = 16384


def gpu_named(name: str) -> Gpu:
    """Returns a GPU of the table, or raises with the legal names."""
    if name.lower() not in GPUS:
        raise UserError(f"gpu={name}: legal names are {', '.join(GPUS)}.")
    return GPUS[name.lower()]


def num_nodes(num_gpus: int, gpus_per_node: int) -> int:
    """Returns how many nodes hold `num_gpus`; refuses a last node that is not full."""
    if not 1 <= num_gpus <= MAX_GPUS:
        raise UserError(f"gpus={num_gpus}: legal are 1 to {MAX_GPUS}.")
    if num_gpus > gpus_per_node and num_gpus % gpus_per_node:
        raise UserError(
            f"gpus={num_gpus} does not fill nodes of {gpus_per_node}: take a multiple of it."
        )
    return max(1, num_gpus // gpus_per_node)


def topology(gpu: Gpu, num_gpus: int, gpus_per_node: int = 8) -> list[jax.Device]:
    """Returns compile-only devices, node after node.

    Needs jax's CUDA plugin (not CUDA itself) and JAX_PLATFORMS=cpu: with the CUDA platform chosen
    the plugin looks for a driver.
    """
    nodes = num_nodes(num_gpus, gpus_per_node)
    shape = f"1x{nodes}x{num_gpus // nodes}"  # slices x hosts x GPUs
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(gpu), topology=shape
    )
    return list(described.devices)


def target_config(gpu: Gpu) -> str:
    """Writes the text of XLA's GpuTargetConfigProto (xla/stream_executor/device_description.proto).

    From sm_90 on the accelerated feature set is chosen (wgmma, TMA), as on the real chip.
    """
    major, minor = gpu.capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    links = "device_interconnect_info { active_links: 18 }" if major >= 9 else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.smem_per_sm}
  shared_memory_per_block_optin: {gpu.smem_per_block}
  core_count: {gpu.sm_count} fpus_per_core: {gpu.fpus_per_sm}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {gpu.hbm_bandwidth:.0f} l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.hbm_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 ecc_enabled: true
  platform_version: "Compute Capability {major}.{minor}{"a" if accelerated else ""}"
  name: "{gpu.device_name}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  {links}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.device_name}"
"""
