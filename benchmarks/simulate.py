"""Simulate data-parallel training on many GPUs, and check the simulation against real runs on this machine.

    python benchmarks/simulate.py

First, 1, 2 and 4 processes (gloo) train a small CLIP here under DDP, with one thread each. The time of a step of one
process, the collectives that 2 and 4 processes really call, with their sizes, and the time of collectives of several
sizes are measured; from these, the simulation predicts the steps of 1, 2 and 4 processes, which are then compared with
the real ones.

Then the same simulation is run for GPUs: operations of a step counted by PyTorch's counter, divided by the published
peak of the GPU times the share of the peak that is reached; collectives on a network of nodes; gradients that are
averaged while the backward pass still runs; failures. Writes simulate.json; `make readme` renders the tables of
docs/scaling.md.
"""

import argparse
import json
import os
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from vlp.training.machine.optim import make_optimizer, parameter_groups
from vlp.training.objectives.clip import ClipObjective

import vlp

RESULTS = Path(__file__).with_suffix(".json")
PROCESSES, STEPS, OWN, BUCKET = (1, 2, 4), 20, 32, 25 * 2**20
SIZES = (2**12, 2**16, 2**20, 2**23)  # bytes of the collectives that are timed
GPUS = (8, 32, 128, 512, 1024)
GOAL = 12.8e9  # samples, as in the longest runs of open_clip


# --- the simulation ---------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A ring of processes: within nodes, and between them.

    Attributes:
        latency, seconds_per_byte: of one hop within a node.
        node: processes in a node.
        node_latency, node_seconds_per_byte: of one hop between nodes, for each process.
    """

    latency: float
    seconds_per_byte: float
    node: int = 10**9
    node_latency: float = 0.0
    node_seconds_per_byte: float = 0.0

    def gather(self, size: float, processes: int) -> float:
        """Seconds of an all-gather, or of a reduce-scatter, whose result or input has `size` bytes."""
        if processes == 1:
            return 0.0
        inside, nodes = min(processes, self.node), max(1, processes // self.node)
        seconds = (inside - 1) * (self.latency + size / processes * self.seconds_per_byte)
        if nodes > 1:  # each process exchanges its part with those of the other nodes, which is then spread in the node
            seconds = (nodes - 1) * (self.node_latency + size / processes * self.node_seconds_per_byte)
            seconds += (inside - 1) * (self.latency + size / inside * self.seconds_per_byte)
        return seconds

    def reduce(self, size: float, processes: int) -> float:
        """Seconds of an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, processes)


def step_seconds(forward: float, backward: float, after: float, exchanges: float, buckets: list[float]) -> float:
    """Seconds of a step under DDP.

    Args:
        forward, backward, after: seconds of the forward pass, the backward pass, and the optimiser.
        exchanges: seconds of the loss's collectives, between the two passes.
        buckets: seconds of the all-reduce of each bucket of gradients; they are ready one after the other, evenly over
            the backward pass, and are averaged one at a time while it goes on.
    """
    start, end = forward + exchanges, forward + exchanges
    for number, seconds in enumerate(buckets):
        ready = start + backward * (number + 1) / len(buckets)
        end = max(end, ready) + seconds
    return max(end, start + backward) + after


# --- real runs here ---------------------------------------------------------------------------------------------------


def tiny_objective(width: int = 256, layers: int = 6) -> tuple[ClipObjective, dict]:
    """A small CLIP, of a width and with this many layers in its image tower, and a batch of OWN pairs."""
    torch.manual_seed(0)
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
              "num_attention_heads": 4, "image_size": 96, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 2000, "max_position_embeddings": 16, "eos_token_id": 1999, "bos_token_id": 1998}  # fmt: skip
    model = vlp.VlpClipModel(vlp.VlpClipConfig(vision_config=vision, text_config=text, projection_dim=256))
    ids = torch.randint(0, 1998, (OWN, 16))
    ids[:, -1] = 1999
    rows = torch.arange(OWN)
    objective = ClipObjective(model, exclude_duplicates=False).train()
    objective.even_batches = True
    return objective, {"pixel_values": torch.randn(OWN, 3, 96, 96), "input_ids": ids, "text_index": rows,
                       "caption_ids": rows, "image_ids": rows}  # fmt: skip


class Recorder:
    """Records the sizes of the collectives that a step calls, by their kind, in bytes."""

    def __init__(self):
        self.calls: list[tuple[str, int]] = []
        for name, size_of in (
            ("all_reduce", lambda given: given[0].nbytes),
            ("all_gather", lambda given: sum(part.nbytes for part in given[0])),
            ("reduce_scatter_tensor", lambda given: given[1].nbytes),
        ):
            setattr(dist, name, self.recorded(name, getattr(dist, name), size_of))

    def recorded(self, name: str, function, size_of):
        def call(*given, **more):
            self.calls.append((name, size_of(given)))
            return function(*given, **more)

        return call

    def hook(self, group, bucket):
        """A communication hook of DDP that records the size of a bucket of gradients, and averages it."""
        self.calls.append(("gradients", bucket.buffer().nbytes))
        buffer = bucket.buffer().div_(dist.get_world_size())
        return dist.distributed_c10d.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def run(rank: int, processes: int, port: int, queue) -> None:
    """Train in one process of a group; rank 0 puts what it measured into the queue."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    objective, batch = tiny_objective()
    optimizer = make_optimizer(parameter_groups(objective.model, 1e-4, 0.1), 0.9, 0.98, 1e-6)
    wrapped, recorder = objective, None
    if processes > 1:
        wrapped = DistributedDataParallel(objective, bucket_cap_mb=BUCKET / 2**20)
        recorder = Recorder()
        wrapped.register_comm_hook(None, recorder.hook)
    parts = []
    for _ in range(STEPS + 3):
        dist.barrier()
        times = [time.perf_counter()]
        if recorder is not None:
            recorder.calls.clear()
        loss = wrapped(**batch)["contrastive"]
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        parts.append([later - earlier for earlier, later in zip(times, times[1:], strict=False)])
    steps = parts[3:]
    calls = list(recorder.calls) if recorder is not None else []
    reductions = {size: collective_seconds(size) for size in SIZES} if processes > 1 else {}
    if rank == 0:
        queue.put({
            "seconds": statistics.median(sum(step) for step in steps),
            "parts": [statistics.median(step[number] for step in steps) for number in range(3)],
            "collectives": calls,
            "all_reduce_seconds": reductions,
        })  # fmt: skip
    dist.destroy_process_group()


def collective_seconds(size: int, times: int = 15) -> float:
    """The median time of an all-reduce of `size` bytes."""
    value, found = torch.zeros(size // 4), []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        dist.distributed_c10d.all_reduce(value)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def run_group(processes: int) -> dict:
    """Run a group of processes, and return what rank 0 measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    group = [context.Process(target=run, args=(rank, processes, port, queue)) for rank in range(processes)]
    for process in group:
        process.start()
    for process in group:
        process.join(300)
    if any(process.exitcode for process in group):
        raise RuntimeError(f"A process of {processes} failed.")
    return queue.get(timeout=10)


def fitted(times: dict[int, float], processes: int) -> Network:
    """The latency and the rate of a hop with which the simulation gives the measured times of all-reduces."""
    sizes, seconds = torch.tensor(list(times), dtype=torch.double), torch.tensor(list(times.values()))
    hops = 2 * (processes - 1)
    design = torch.stack([torch.full_like(sizes, hops), hops * sizes / processes], dim=1)
    weights = 1 / seconds.double()[:, None]  # relative errors count
    found = torch.linalg.lstsq(design * weights, seconds.double()[:, None] * weights).solution[:, 0].clamp(min=0)
    return Network(latency=found[0].item(), seconds_per_byte=found[1].item())


def predict(alone: dict, group: dict, processes: int, cores: int) -> float:
    """Predict the seconds of a step of several processes on this machine.

    Args:
        alone: what one process measured; for one process, what is expected of it (see `expected_alone`).
        group: the collectives of the real group, and the times of its all-reduces.
        processes: number of processes.
        cores: cores of the machine, which the processes share.
    """
    slower = max(1.0, processes / cores)
    forward, backward, after = (slower * part for part in alone["parts"])
    if processes == 1:
        return step_seconds(forward, backward, after, 0.0, [])
    network = fitted({int(size): seconds for size, seconds in group["all_reduce_seconds"].items()}, processes)
    exchanges, buckets = 0.0, []
    for name, size in group["collectives"]:
        if name == "gradients":
            buckets.append(network.reduce(size, processes))
        elif name == "all_gather":
            exchanges += network.gather(size, processes)
        else:  # gloo's reduce-scatter is an all-reduce
            exchanges += network.reduce(size, processes)
    # A collective of gloo needs the cores that compute, so nothing is hidden behind the backward pass.
    return forward + exchanges + backward + sum(buckets) + after


# --- many GPUs --------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A kind of GPU in nodes of eight. Rates are those of the manufacturer's data sheets, per GPU.

    Attributes:
        peak: dense operations in bfloat16 per second.
        single: operations in float32 per second, in which the loss is computed.
        inside: bytes per second to the other GPUs of the node, in one direction.
        between: bytes per second to other nodes, in one direction.
    """

    name: str
    peak: float
    single: float
    inside: float
    between: float
    node: int = 8

    @property
    def network(self) -> Network:
        return Network(3e-6, 1 / self.inside, self.node, 8e-6, 1 / self.between)


MACHINES = [Machine("A100 80 GB, NVLink 3, 200 Gb/s each", 312e12, 19.5e12, 300e9, 25e9),
            Machine("H100 80 GB, NVLink 4, 400 Gb/s each", 989e12, 67e12, 450e9, 50e9)]  # fmt: skip
# Meta, 2024 (arXiv:2407.21783, table 5): 419 unexpected interruptions in 54 days on 16,384 GPUs.
HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419
RESTART, SAVE_MINUTES = 300.0, 10.0  # seconds until a job runs again; minutes between states (the default)


@dataclass
class Workload:
    """What a step computes and sends.

    Attributes:
        operations: of the forward pass, for one sample.
        again: how many more forward passes a step needs, such as a teacher's.
        trained: parameters that are trained.
        batch: samples for each GPU.
        width: numbers of the features that each sample sends to all processes.
        embedding: numbers of an embedding, in the products of the contrastive loss.
    """

    name: str
    operations: float
    again: float
    trained: int
    batch: int
    width: int
    embedding: int


def counted(function) -> float:
    """The operations of a function."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def workloads() -> list[Workload]:
    """CLIP L/14, BLIP B/16 and BLIP-2's first stage with a ViT-L/14, on pictures of 224 pixels and 32 tokens."""
    with torch.inference_mode():
        pixels, ids = torch.zeros(1, 3, 224, 224), torch.ones(1, 32, dtype=torch.long)
        clip = vlp.VlpClipModel(vlp.VlpClipConfig(
            vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                           "num_attention_heads": 16, "patch_size": 14},
            text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            projection_dim=768,
        ))  # fmt: skip
        blip = vlp.VlpBlipForPreTraining(vlp.VlpBlipConfig())
        blip2 = vlp.VlpBlip2ForPreTraining(vlp.VlpBlip2Config(vision_config={
            "model_type": "vlp_blip_vit", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "patch_size": 14}))  # fmt: skip
        of_clip = counted(lambda: (clip.get_image_features(pixels), clip.get_text_features(ids)))
        vision = counted(lambda: blip.get_image_features(pixels))
        text = counted(lambda: blip.get_text_features(ids))
        memory = blip.memory_of(blip.encode_image(pixels).last_hidden_state)
        grounded = counted(lambda: blip.match(ids, None, memory, pack=False))
        tower = counted(lambda: blip2.encode_image(pixels))
        states = blip2.memory_of(blip2.encode_image(pixels))
        queries = counted(lambda: blip2.query(states))
        sentence = counted(lambda: blip2.get_text_features(ids))
    count = {name: sum(p.numel() for p in model.parameters() if p.requires_grad)
             for name, model in (("clip", clip), ("blip", blip), ("blip2", blip2))}  # fmt: skip
    learnt = 5 * queries + sentence  # ITC, ITM three times, and text generation after the queries
    return [
        Workload("CLIP ViT-L/14", of_clip, 0.0, count["clip"], 512, 768, 768),
        # ITM three times and LM; the teacher runs both towers forward once more
        Workload("BLIP ViT-B/16", vision + text + 4 * grounded, (vision + text) / (vision + text + 4 * grounded) / 3,
                 count["blip"], 128, 256, 256),
        # the frozen tower runs forward only
        Workload("BLIP-2, stage 1, ViT-L/14", learnt, tower / learnt / 3, count["blip2"], 128, 32 * 256, 32 * 256),
    ]  # fmt: skip


def simulate(work: Workload, machine: Machine, gpus: int, share: float) -> dict:
    """Simulate a step, and a run with failures, on a number of GPUs of which each reaches a share of its peak."""
    forward = work.batch * work.operations / (machine.peak * share)
    backward, more = 2 * forward, 3 * work.again * forward
    network, features = machine.network, gpus * work.batch * work.width * 4
    products = 4 * 2 * work.batch * (gpus * work.batch) * work.embedding / machine.single  # docs/scaling.md
    exchanges = 2 * network.gather(features, gpus)
    whole = -(-4 * work.trained // BUCKET)
    buckets = [network.reduce(4 * work.trained / whole, gpus)] * int(whole)
    step = step_seconds(forward + more, backward, 0.0, exchanges + products, buckets)
    alone = forward + more + backward
    failures = gpus / (HOURS_BETWEEN_FAILURES * 3600)  # per second
    lost = RESTART + SAVE_MINUTES * 60 / 2
    useful = 1 / (1 + failures * lost)
    rate = gpus * work.batch / step * useful
    return {"gpus": gpus, "step_seconds": step, "waiting_seconds": step - alone - products,
            "loss_seconds": products, "samples_per_second": rate,
            "efficiency": alone / step * useful, "failures_per_day": failures * 86_400,
            "days": GOAL / rate / 86_400}  # fmt: skip


def seconds_of(function, times: int = 8) -> float:
    """The median seconds of a function, after two calls that are not counted."""
    found = []
    for _ in range(times + 2):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def reached_share() -> tuple[float, float]:
    """This machine's matrix-product peak with one thread, and the share that a step of another, wider CLIP reaches."""
    torch.set_num_threads(1)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    peak = 2 * 2048**3 / seconds_of(lambda: left @ right)
    objective, batch = tiny_objective(384, 4)
    seconds = seconds_of(lambda: objective(**batch)["contrastive"].backward())
    return peak, step_operations(objective, batch) / seconds / peak


def step_operations(objective: ClipObjective, batch: dict) -> float:
    """The operations of a forward and a backward pass."""
    return counted(lambda: objective(**batch)["contrastive"].backward())


def expected_alone(peak: float, share: float) -> dict:
    """What one process should take for a step, from its operations alone: a third of them are the forward pass."""
    seconds = step_operations(*tiny_objective()) / (peak * share)
    return {"parts": [seconds / 3, 2 * seconds / 3, 0.0]}


# --- tables -----------------------------------------------------------------------------------------------------------


def check_table(result: dict) -> str:
    """The predicted and the measured steps of this machine."""
    lines = ["| processes | a step, measured | predicted | difference |", "| --- | --- | --- | --- |"]
    for row in result["here"]:
        lines.append(
            f"| {row['processes']} | {1000 * row['measured']:.0f} ms | {1000 * row['predicted']:.0f} ms | "
            f"{100 * (row['predicted'] / row['measured'] - 1):+.0f} % |"
        )
    return "\n".join(lines)


def gpu_table(result: dict) -> str:
    """The simulated runs."""
    lines = [
        "| model | GPUs | samples/s | efficiency | a step | loss | waiting | failures a day | days for 12.8 billion |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["gpus"]:
        lines.append(
            f"| {row['model']} | {row['gpus']:,} {row['machine'].split()[0]} | {row['samples_per_second']:,.0f} | "
            f"{100 * row['efficiency']:.0f} % | {1000 * row['step_seconds']:.0f} ms | "
            f"{1000 * row['loss_seconds']:.1f} ms | "
            f"{1000 * row['waiting_seconds']:.1f} ms | {row['failures_per_day']:.2f} | {row['days']:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4, help="share of the GPU's peak that is reached")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    peak, share_here = reached_share()
    measured = {processes: run_group(processes) for processes in PROCESSES}
    here = []
    for processes in PROCESSES:
        alone = measured[1] if processes > 1 else expected_alone(peak, share_here)
        predicted = predict(alone, measured[processes], processes, cores)
        here.append({"processes": processes, "measured": measured[processes]["seconds"], "predicted": predicted})
        print(f"{processes} processes: {here[-1]['measured']:.3f} s measured, {predicted:.3f} s predicted")
    rows = []
    for work in workloads():
        for machine in MACHINES:
            for gpus in GPUS:
                row = simulate(work, machine, gpus, options.share)
                rows.append({"model": work.name, "machine": machine.name} | row)
    result = {"here": here, "measured": measured, "gpus": rows, "share": options.share,
              "share_here": share_here, "workloads": [asdict(work) for work in workloads()]}  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(check_table(result), gpu_table(result), f"share here: {result['share_here']:.2f}", sep="\n\n")


if __name__ == "__main__":
    main()
