"""Run training with FSDP2 on CPUs; Accelerate itself supports FSDP only on GPUs."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from vlp.training import run, setup

make_accelerator = setup.make_accelerator


def make_sharding_accelerator(arguments):
    accelerator = make_accelerator(arguments)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def run_sharded() -> None:
    """Do what `python -m vlp.training` does, with sharded parameters."""
    setup.make_accelerator = make_sharding_accelerator
    run.main()
