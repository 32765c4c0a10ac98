"""A run under FSDP2 on CPUs; Accelerate chooses FSDP on GPUs alone. Started by tests/test_training.py."""

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


setup.make_accelerator = make_sharding_accelerator
if __name__ == "__main__":
    run.main()
