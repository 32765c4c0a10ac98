"""The hardware: processes, precision, threads and memory."""

import ctypes
import dataclasses
import logging
import os
import platform
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from transformers.integrations import unset_hf_deepspeed_config

from ...errors import ArgumentError
from ...files import state_folder
from ..arguments import TrainingArguments

PRE_TRAINED = ("image_tower", "text_tower", "vision_tower", "model_name_or_path")  # options that name models


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
    # If only part of the model is trained at first, DDP must not wait for the gradients of the rest. Pre-trained towers
    # can have parameters that are never used, such as DINOv2's mask token.
    given = (getattr(arguments, name, None) for name in PRE_TRAINED)
    partly = getattr(arguments, "contrastive_share", 0.0) > 0 or any(given)
    # Tasks of BLIP that read only the cells of a ModifiedResNet do not use its pooling.
    partly |= getattr(arguments, "task", "pretrain") != "pretrain"
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=partly)]
    if precision == "fp16" and arguments.optimizer == "muon":
        raise ArgumentError(
            "--optimizer muon does not skip the steps that overflow in fp16: use --mixed_precision bf16."
        )
    on_cpus, deepspeed = not torch.accelerator.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if on_cpus and deepspeed:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))  # else Accelerate does not connect CPU processes
    try:
        accelerator = Accelerator(
            cpu=on_cpus and not deepspeed,  # the same
            mixed_precision=precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=str(state_folder(arguments.output_dir)),
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        raise ArgumentError(f"--mixed_precision {precision}, --report_to {arguments.report_to}: {error}") from error
    if arguments.report_to != "none" and not accelerator.log_with:
        raise ArgumentError(f"--report_to {arguments.report_to} needs a package that is not installed.")
    if on_cpus and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus(accelerator)
    if accelerator.is_fsdp2 and arguments.ema_decay:
        raise ArgumentError(
            "--ema_decay needs a full copy of the model in each process, which FSDP2 does not keep: use --ema_decay 0."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ArgumentError("FSDP 1 is not supported: set fsdp_version: 2 in Accelerate's configuration.")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ArgumentError(
            f"{started} processes were started, but Accelerate connects only {accelerator.num_processes} of them: "
            "choose num_processes, distributed_type and use_cpu in its configuration for this machine."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if arguments.optimizer == "muon":
            raise ArgumentError("--optimizer muon needs whole matrices, which DeepSpeed does not keep: use FSDP2.")
        configure_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, arguments, precision)
    return accelerator


def shard_on_cpus(accelerator: Accelerator) -> None:
    """Let Accelerate shard the model over CPU processes, too, as its configuration says; by itself it would not."""
    plugin = FullyShardedDataParallelPlugin()  # from the environment that `accelerate launch` sets
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def configure_deepspeed(config: dict, arguments: TrainingArguments, precision: str) -> None:
    """Complete DeepSpeed's configuration.

    Weights stay in float32 and computations are autocast, as they are without DeepSpeed; DeepSpeed's own "bf16" and
    "fp16" cast all weights, but not the inputs. Models are built whole in each process, and divided afterwards.

    Args:
        config: DeepSpeed's configuration, changed in place.
        arguments: options of the run.
        precision: "no", "bf16" or "fp16".
    """
    config["train_micro_batch_size_per_gpu"] = arguments.per_device_train_batch_size  # Accelerate cannot know it
    if precision != "no":
        config[precision] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}
    unset_hf_deepspeed_config()


def precision_of(accelerator: Accelerator) -> str:
    """Return the precision of a run's computations: "no" (float32), "bf16" or "fp16"."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    autocast = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {})
    return {"bfloat16": "bf16", "float16": "fp16"}.get(autocast.get("dtype"), "no")


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


def use_cpu_well(threads: int | None, processes: int = 1) -> None:
    """Set the number of threads (`accelerate launch` sets one), and keep freed memory for reuse.

    A training step allocates and frees the same large blocks repeatedly. glibc returns each one to the system, which
    then has to zero its pages again. With freed memory kept, a step was about twice as fast when this was measured.

    Args:
        threads: threads of this process; if None, the cores divided by the processes.
        processes: number of processes on this machine.
    """
    torch.set_num_threads(threads or max(1, cpu_cores() // processes))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max, largest = -1, -4, 2**31 - 1  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(trim_threshold, largest)
        libc.mallopt(mmap_max, 0)
