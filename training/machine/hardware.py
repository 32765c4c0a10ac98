"""The machine: its processes, precision, threads and memory."""

import ctypes
import dataclasses
import logging
import os
import platform
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from ...errors import ArgumentError
from ...files import state_folder
from ..arguments import TrainingArguments


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Raises ArgumentError where the machine cannot do what is asked for."""
    # Accelerate warns of tied weights at each save; they are stored once, and tied again when loaded.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    precision = arguments.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_in_bfloat16() else "no"
    # Where only a part of the model is trained at first, a process must not wait for the gradients of the rest.
    partly = getattr(arguments, "contrastive_share", 0.0) > 0
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=str(state_folder(arguments.output_dir)),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=partly)],
        )
    except ValueError as error:
        raise ArgumentError(f"--mixed_precision {precision}, --report_to {arguments.report_to}: {error}") from error
    if accelerator.is_fsdp2 and arguments.ema_decay:
        raise ArgumentError("--ema_decay keeps a whole copy of the model, which FSDP2 has nowhere: leave it out.")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ArgumentError("FSDP's first version is not supported: set fsdp_version: 2 in Accelerate's configuration.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Batches do not come from a loader that Accelerate prepared, so it cannot know their size.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = arguments.per_device_train_batch_size
    return accelerator


def start_trackers(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    if arguments.report_to != "none":
        plain = {k: v for k, v in dataclasses.asdict(arguments).items() if isinstance(v, (bool, int, float, str))}
        accelerator.init_trackers("logs", config=plain)


def computes_in_bfloat16() -> bool:
    """Whether the hardware has bfloat16 arithmetic; where it is only emulated, float32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.backends.cpu.get_cpu_capability() if torch.backends.cpu else ""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return capabilities.startswith("AVX512") and ("avx512_bf16" in flags or "amx_bf16" in flags)


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_well(threads: int) -> None:
    """All threads that there are (`accelerate launch` leaves one), and freed memory kept.

    A training step frees and takes the same large blocks again and again; glibc gives each back to the system, which
    then hands out zeroed pages one by one. Kept, the same step ran about twice as fast where this was measured.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max, largest = -1, -4, 2**31 - 1  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(trim_threshold, largest)
        libc.mallopt(mmap_max, 0)
