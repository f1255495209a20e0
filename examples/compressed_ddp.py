"""Data-parallel training with less traffic: seven ways of keeping the workers' networks together.

    torchrun --nproc-per-node 2 examples/compressed_ddp.py --sync fp32 coded averaging
    python examples/compressed_ddp.py                       # starts two processes on this machine by itself

The data are scikit-learn's digits, 1,797 images of 8 x 8 pixels, a fifth of them the test. Every worker sees its part of
them in every epoch. Workers are on GPUs, one each, with NCCL where there are enough, otherwise on the CPU with gloo.

    fp32       DistributedDataParallel as it is: gradients are averaged at every step, in float32
    bf16       gradients in bfloat16, as torch's bf16_compress_hook sends them, which asks for GPUs
    powersgd   torch's PowerSGD hook, rank 2
    coded      entropy_compression_hook: gradients quantised by their entropy and Huffman coded
    auto       the same hook, which measures what is soonest on this link: float32, bfloat16 or coded
    averaging  workers train by themselves; CompressedModelAverager averages weights once an epoch
    diloco     the same with AdamW, and an outer optimiser: Nesterov momentum on the mean movement (arXiv 2311.08105)
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from platonic import datasets
from weight_compression.distributed import CompressedModelAverager, EntropyCompressionState, entropy_compression_hook

SYNCS = ["fp32", "bf16", "powersgd", "coded", "auto", "averaging", "diloco"]
SHOWN = ["fp32", "bf16", "coded", "averaging"]
BATCH = 32  # of every worker


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))


def load_data(device):
    """Pixels from 0 to 1 and classes: of training and test."""
    data = datasets.load("digits")
    pixels = [torch.as_tensor(x, dtype=torch.float32, device=device) / 16 for x in (data.X_train, data.X_test)]
    classes = [torch.as_tensor(y, dtype=torch.int64, device=device) for y in (data.y_train, data.y_test)]
    return pixels[0], classes[0], pixels[1], classes[1]


class Gradients:
    """Gradients are averaged at every step, by DistributedDataParallel."""

    def __init__(self, network, sync, period):
        device = next(network.parameters()).device
        self.model = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
        self.state = None
        if sync == "powersgd":
            self.state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
            self.model.register_comm_hook(self.state, powerSGD_hook.powerSGD_hook)
        elif sync != "fp32":
            self.state = EntropyCompressionState(mode=sync, module=network)
            self.model.register_comm_hook(self.state, entropy_compression_hook)
        self.sync = sync

    def after_step(self):
        """Nothing is left to do: backward has averaged."""

    def bytes_sent(self, before, steps):
        if self.sync == "powersgd":  # torch counts elements from the third step on, before the link's 2 (W - 1) / W
            _, full, factors = self.state.compression_stats()
            return before * (2 + (steps - 2) * factors / full) / steps
        if self.state is not None:
            return self.state.stats()["bytes_sent"]
        return before


class Weights:
    """Workers train by themselves and average their weights every `period` steps."""

    def __init__(self, network, sync, period):
        outer = None
        if sync == "diloco":

            def outer(weights):
                return torch.optim.SGD(weights, lr=0.7, momentum=0.9, nesterov=True)

        self.model = network
        self.averager = CompressedModelAverager(period, warmup_steps=period - 1, outer_optimizer=outer)
        self.averager.broadcast_parameters(network.named_parameters())

    def after_step(self):
        self.averager.average_parameters(self.model.named_parameters())

    def bytes_sent(self, before, steps):
        return self.averager.stats()["bytes_sent"]


def train(sync, data, rank, ranks, epochs):
    """Test accuracy, bytes that float32 gradients take and that this worker sent, seconds."""
    x, y, x_test, y_test = data
    network = make_network().to(x.device)
    steps = len(x) // ranks // BATCH
    workers = (Weights if sync in ("averaging", "diloco") else Gradients)(network, sync, steps)
    if sync == "diloco":  # its outer momentum asks for a careful inner optimiser
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    shuffle = torch.Generator().manual_seed(1)  # the same on all workers, each of which takes its part
    started = time.perf_counter()
    with tqdm(range(epochs), desc=sync, unit="epoch", leave=False, disable=None if rank == 0 else True) as bar:
        for _ in bar:
            part = torch.randperm(len(x), generator=shuffle)[rank::ranks]
            for batch in part[: steps * BATCH].split(BATCH):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(workers.model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                workers.after_step()
            bar.set_postfix(loss=f"{loss.item():.4f}")
    seconds = time.perf_counter() - started
    with torch.no_grad():
        accuracy = (network(x_test).argmax(1) == y_test).double().mean().item()
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    before = epochs * steps * size * 2 * (ranks - 1) / ranks
    return accuracy, before, workers.bytes_sent(before, epochs * steps), seconds


def run(rank, ranks, local_rank, local_ranks, store, options):
    """One worker. torchrun says who it is in the environment; without it, there is a store."""
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # batches are too small for more
    dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=ranks)
    data = load_data(device)
    if rank == 0:
        print(
            f"{ranks} workers, {'GPUs with NCCL' if on_gpus else 'CPU with gloo'}; {options.epochs} epochs of digits\n"
        )
        print(f"{'sync':10} {'accuracy':>9} {'float32 MB':>11} {'sent MB':>9} {'times fewer':>12} {'seconds':>8}")
    for sync in options.sync:
        accuracy, before, sent, seconds = train(sync, data, rank, ranks, options.epochs)
        if rank == 0:
            fewer = before / sent if sent else 1.0
            numbers = f"{before / 1e6:11.2f} {sent / 1e6:9.2f} {fewer:12.1f} {seconds:8.1f}"
            print(f"{sync:10} {accuracy:9.4f} {numbers}", flush=True)
    if rank == 0:
        print("\nMegabytes that a worker sends; float32: for gradients at every step.")
    dist.destroy_process_group()


def run_without_torchrun(rank, port, options):
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    run(rank, options.workers, rank, options.workers, store, options)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", nargs="+", choices=SYNCS, default=SHOWN, help=f"default: {' '.join(SHOWN)}")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2, help="processes to start; torchrun has its own option")
    options = parser.parse_args(argv)
    if options.epochs < 1 or options.workers < 1:
        parser.error("--epochs and --workers: expected at least 1")
    if dist.is_torchelastic_launched():
        here = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        run(here["RANK"], here["WORLD_SIZE"], here["LOCAL_RANK"], here["LOCAL_WORLD_SIZE"], None, options)
    else:
        print(f"not started by torchrun: starting {options.workers} processes here")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        torch.multiprocessing.spawn(run_without_torchrun, (store.port, options), nprocs=options.workers)


if __name__ == "__main__":
    main()
