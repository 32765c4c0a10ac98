"""The hardware: processes, precision, threads and memory."""

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
    """Create the accelerator of a run.

    Raises:
        ArgumentError: if the hardware or Accelerate's configuration does not support the options.
    """
    # Accelerate warns about tied weights at each save; they are saved once, and tied again on loading.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    precision = arguments.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_in_bfloat16() else "no"
    # If only part of the model is trained at first, DDP must not wait for the gradients of the rest.
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
    if arguments.report_to != "none" and not accelerator.log_with:
        raise ArgumentError(f"--report_to {arguments.report_to} needs a package that is not installed.")
    if accelerator.is_fsdp2 and arguments.ema_decay:
        raise ArgumentError(
            "--ema_decay needs a full copy of the model in each process, which FSDP2 does not keep: use --ema_decay 0."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ArgumentError("FSDP 1 is not supported: set fsdp_version: 2 in Accelerate's configuration.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != accelerator.num_processes:
            raise ArgumentError(f"{started} processes were started; with DeepSpeed, each needs a GPU of its own.")
        # Accelerate does not prepare the data loader, so it cannot know the batch size.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = arguments.per_device_train_batch_size
    return accelerator


def start_trackers(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    if arguments.report_to != "none":
        plain = {k: v for k, v in dataclasses.asdict(arguments).items() if isinstance(v, (bool, int, float, str))}
        accelerator.init_trackers("logs", config=plain)


def computes_in_bfloat16() -> bool:
    """Return whether the hardware has bfloat16 arithmetic; if it is only emulated, float32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.backends.cpu.get_cpu_capability() if torch.backends.cpu else ""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return capabilities.startswith("AVX512") and ("avx512_bf16" in flags or "amx_bf16" in flags)


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_well(threads: int) -> None:
    """Set the number of threads (`accelerate launch` sets one), and keep freed memory for reuse.

    A training step allocates and frees the same large blocks repeatedly. glibc returns each one to the system, which
    then has to zero its pages again. With freed memory kept, a step was about twice as fast when this was measured.

    Args:
        threads: threads of this process.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max, largest = -1, -4, 2**31 - 1  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(trim_threshold, largest)
        libc.mallopt(mmap_max, 0)
