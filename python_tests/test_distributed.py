"""Coded collectives in real processes, against the same scheme in one process and against float64."""

import hashlib
import time

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from weight_compression import CompressionConfig, compress, decompress, payload_info
from weight_compression.distributed import (
    compressed_all_gather,
    compressed_all_reduce,
    compressed_broadcast,
)
from weight_compression.distributed.channel import Task, channel_of
from weight_compression.distributed.plan import EXACT_BELOW, PIECE, WHOLE_BELOW, Ownership, make_pieces

AVG, SUM = dist.ReduceOp.AVG, dist.ReduceOp.SUM


def bits_of(x):
    """A tensor's bytes as an int64, comparable across processes."""
    return hashlib.sha256(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def values(rank, shape, dtype=torch.float32, seed=0):
    """Of a rank: other scales and offsets than those of the others, with outliers."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * (1 + 0.3 * rank) + 0.05 * x**3 + 0.2 * rank).to(dtype)


def reduce_here(inputs, lengths, scale, config):
    """The scheme in one process, and its error bound by element. Flat inputs of all ranks."""
    ranks = len(inputs)
    if ranks == 1:
        return inputs[0], torch.zeros(inputs[0].numel(), dtype=torch.float64)
    working = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    out, bound = torch.empty_like(inputs[0]), torch.zeros(inputs[0].numel(), dtype=torch.float64)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for piece in make_pieces(list(enumerate(lengths)), ranks, Ownership(ranks)):
        for owner in range(ranks):
            for f in (*piece.coded[owner], *piece.exact[owner]):
                coded = f.numel >= EXACT_BELOW
                part = slice(starts[f.tensor] + f.start, starts[f.tensor] + f.stop)
                total = torch.zeros(f.numel, dtype=working)
                for rank, x in enumerate(inputs):
                    mine = x[part].to(working)
                    if rank == owner or not coded:
                        total.add_(mine, alpha=scale)
                    else:
                        payload = compress(mine, config)
                        bound[part] += scale * payload_info(payload).error_bound
                        decompress(payload, total, accumulate=True, scale=scale)
                if coded:
                    payload = compress(total, config)
                    bound[part] += payload_info(payload).error_bound
                    total = decompress(payload)
                out[part] = total.to(out.dtype)
    return out, bound


def check_reduction(shape, *, dtype=torch.float32, op=AVG, config=None, segments=None, make=values, seed=0):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = [make(r, shape, dtype, seed) for r in range(ranks)]
    got = inputs[rank].clone()
    assert compressed_all_reduce(got, op, config=config, segments=segments) is None
    if rank > 0:
        return bits_of(got)  # rank 0 checks them for all
    scale = 1 / ranks if op == AVG else 1.0
    flat = [x.reshape(-1) for x in inputs]
    expected, bound = reduce_here(flat, segments or [flat[0].numel()], scale, config)
    assert torch.equal(got.reshape(-1), expected), (shape, dtype, op, config)
    exact = scale * sum(x.double() for x in flat)
    largest = scale * sum(x.double().abs() for x in flat) + bound
    roundoff = 4 * ranks * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if dtype in (torch.float16, torch.bfloat16):
        roundoff += torch.finfo(dtype).eps
    error = (expected.double() - exact).abs()
    assert bool((error <= bound + roundoff * largest + 1e-30).all()), (shape, dtype, (error - bound).max())
    return bits_of(got)


LARGE = PIECE + 1001
SHAPES = [(), (1,), (0,), (3, 0), (7, 5), (EXACT_BELOW - 1,), (EXACT_BELOW,), (33, 257), (WHOLE_BELOW * 4 + 77,)]


def scaled_layers(rank, shape, dtype, seed):
    """Segments of 900, 5,000, 100 and 60,000 elements, each of another scale."""
    x = values(rank, shape, dtype, seed)
    for part, scale in zip(x.split([900, 5000, 100, 60_000]), (1.0, 1e-4, 10.0, 1e-2), strict=True):
        part.mul_(scale)
    return x


def constant(rank, shape, dtype, seed):
    return torch.full(shape, 0.25 * rank, dtype=dtype)


def all_reduce_everything(rank):
    seen = {}
    for shape in SHAPES:
        for op in (AVG, SUM):
            seen[shape, str(op)] = check_reduction(shape, op=op)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for shape in ((0,), (5,), (3000,), (WHOLE_BELOW * 4 + 77,)):
            seen[shape, str(dtype)] = check_reduction(shape, dtype=dtype)
    for name, config in {
        "c = 2": CompressionConfig(floor_bits=2),
        "8 bits": CompressionConfig(bits=8),
        "bound": CompressionConfig(max_error=1e-3),
        "groups": CompressionConfig(group_size=64),
        "clipped": CompressionConfig(clip_quantile=0.99),
        "lossless": CompressionConfig(lossless=True),
    }.items():
        seen[name] = check_reduction((20_000,), config=config, op=SUM)
    if dist.get_world_size() == 2:
        seen["large"] = check_reduction((LARGE,))
    seen["constant"] = check_reduction((5000,), make=constant)
    seen["zero"] = check_reduction((200_000,), make=lambda rank, shape, dtype, seed: torch.zeros(shape, dtype=dtype))
    segments = [900, 5000, 100, 60_000]
    seen["segments"] = check_reduction((66_000,), segments=segments, make=scaled_layers)
    seen["empty segments"] = check_reduction((66_000,), segments=[0, 900, 5000, 0, 100, 60_000, 0], make=scaled_layers)
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_reduce_is_the_scheme_within_its_bound_and_the_same_everywhere(ranks):
    seen = run_ranks(all_reduce_everything, ranks)
    assert all(of_rank == seen[0] for of_rank in seen)


def all_reduce_layouts(rank):
    ranks = dist.get_world_size()
    expected = values(rank, (60, 70))
    compressed_all_reduce(expected)

    transposed = values(rank, (60, 70)).T.contiguous().T
    assert not transposed.is_contiguous()
    compressed_all_reduce(transposed)
    assert torch.equal(transposed, expected)

    wide = torch.full((60, 140), 9.0)
    wide[:, ::2] = values(rank, (60, 70))
    compressed_all_reduce(wide[:, ::2])
    assert torch.equal(wide[:, ::2], expected)
    assert bool((wide[:, 1::2] == 9.0).all())

    parameter = torch.nn.Parameter(values(rank, (60, 70)))
    version = parameter._version
    with torch.no_grad():
        compressed_all_reduce(parameter)
    assert torch.equal(parameter, expected)
    assert parameter._version > version

    # Small layers keep their own range beside large ones.
    x = scaled_layers(rank, (66_000,), torch.float32, 0)
    exact = sum(scaled_layers(r, (66_000,), torch.float64, 0) for r in range(ranks)) / ranks
    apart, together = x.clone(), x.clone()
    compressed_all_reduce(apart, segments=[900, 5000, 100, 60_000])
    compressed_all_reduce(together)
    small = slice(900, 5900)
    assert (apart[small] - exact[small]).norm() < 0.1 * exact[small].norm()
    assert (together[small] - exact[small]).norm() > exact[small].norm()
    # Below 1,024 elements nothing is quantised.
    torch.testing.assert_close(apart[:900], exact[:900].float(), rtol=1e-6, atol=1e-6)

    # Several at once are those one by one.
    sizes = [(3000,), (WHOLE_BELOW * 4,), (10,), (0,), (700, 100), (PIECE + 5,)]
    tensors = [values(rank, shape, seed=i) for i, shape in enumerate(sizes)]
    alone = [x.clone() for x in tensors]
    for x in alone:
        compressed_all_reduce(x, SUM)
    # The same bytes as before, too.
    futures = [compressed_all_reduce(x, SUM, async_op=True) for x in tensors]
    for future, x, one in zip(reversed(futures), reversed(tensors), reversed(alone), strict=True):
        assert future.wait() is x
        assert torch.equal(x, one)
    return [bits_of(x) for x in (expected, apart, *alone)]


def test_all_reduce_of_other_layouts_and_of_several_at_once():
    seen = run_ranks(all_reduce_layouts, 3)
    assert seen[0] == seen[1] == seen[2]


def all_reduce_nonfinite(rank):
    seen = []
    for where, dtype in ((3, torch.float32), (70_000, torch.float32), (3, torch.float16), (70_000, torch.float64)):
        for wrong in (float("nan"), float("inf"), -float("inf")):
            for at in (0, 1):  # one rank, or both with opposite signs
                x = values(rank, (200_000,), dtype)
                if rank == at or at == 1:
                    x[where] = wrong if rank == 0 else -wrong
                small = x[:100].clone()
                compressed_all_reduce(x, SUM)
                compressed_all_reduce(small, SUM)
                for got, hit in ((x, True), (small, where < 100)):
                    finite = torch.isfinite(got)
                    assert int((~finite).sum()) == int(hit), (where, dtype, wrong, at)
                if at == 0:
                    value = x[where]
                    assert bool(value.isnan() if wrong != wrong else value == wrong)
                elif wrong == wrong:
                    assert bool(x[where].isnan())  # inf - inf
                # Fragments that hold it are exact, others are quantised as ever.
                good = sum(values(r, (200_000,), dtype).double() for r in range(2))
                good[where] = x[where] = 0.0
                assert (x.double() - good).norm() < 0.05 * good.norm()
                seen.append(bits_of(x))
    big = torch.full((5000,), 3e38)
    big[::2] = -3e38
    compressed_all_reduce(big, SUM)  # overflows
    assert bool(torch.isinf(big).all())
    seen.append(bits_of(big))
    return seen


def test_nonfinite_values_reach_all_ranks_alike():
    seen = run_ranks(all_reduce_nonfinite, 2)
    assert seen[0] == seen[1]


def work_in_subgroups(rank):
    evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
    late = dist.new_group([3, 1, 2], sort_ranks=False)
    mine, theirs = (evens, [0, 2]) if rank % 2 == 0 else (odds, [1, 3])
    x = values(rank, (9000,))
    compressed_all_reduce(x, SUM, mine)
    expected, _ = reduce_here([values(r, (9000,)) for r in theirs], [9000], 1.0, None)
    assert torch.equal(x, expected)

    # Two groups at once, started in the same order everywhere.
    a, b = values(rank, (300_000,), seed=1), values(rank, (250_000,), seed=2)
    first = compressed_all_reduce(a, AVG, mine, async_op=True)
    second = compressed_all_reduce(b, AVG, async_op=True)
    second.wait()
    first.wait()
    expected_a, _ = reduce_here([values(r, (300_000,), seed=1) for r in theirs], [300_000], 0.5, None)
    expected_b, _ = reduce_here([values(r, (250_000,), seed=2) for r in range(4)], [250_000], 0.25, None)
    assert torch.equal(a, expected_a)
    assert torch.equal(b, expected_b)

    # Ranks of a group count in the order in which torch keeps them.
    if rank in (1, 2, 3):
        order = dist.get_process_group_ranks(late)
        assert order == [3, 1, 2]
        x = values(rank, (5000,))
        compressed_broadcast(x, order[2], late)
        assert torch.equal(x, decompress(compress(values(order[2], (5000,)))))
        outs = [torch.empty(2000 + r) for r in order]
        compressed_all_gather(outs, values(rank, (2000 + rank,)), late)
        for r, out in zip(order, outs, strict=True):
            assert torch.equal(out, decompress(compress(values(r, (2000 + r,)))))
    try:
        compressed_broadcast(torch.zeros(5), 1 if rank % 2 == 0 else 0, mine)
    except ValueError as error:
        assert "expected a rank of the group" in str(error)
    else:
        raise AssertionError("expected an error for a source outside the group")
    return True


def test_subgroups_and_two_groups_at_once():
    run_ranks(work_in_subgroups, 4)


def hand_out_everything(rank):
    ranks = dist.get_world_size()
    seen = []
    for src in range(ranks):
        for shape, dtype in (
            ((), torch.float32), ((0,), torch.float32), ((10,), torch.float16), ((70, 80), torch.bfloat16),
            ((5000,), torch.float64), ((PIECE + 12_345,), torch.float32),
        ):  # fmt: skip
            if shape == (PIECE + 12_345,) and src > 0:
                continue
            x = values(rank, shape, dtype, seed=src)
            sent = values(src, shape, dtype, seed=src)
            compressed_broadcast(x, src)
            if sent.numel() < EXACT_BELOW:
                assert torch.equal(x, sent)
            else:
                working = sent.to(torch.float64 if dtype == torch.float64 else torch.float32).reshape(-1)
                parts = [decompress(compress(part)) for part in working.split(PIECE)]
                assert torch.equal(x, torch.cat(parts).view(shape).to(dtype))
            seen.append(bits_of(x))
    x = values(rank, (90, 40)).T
    compressed_broadcast(x, ranks - 1)
    assert torch.equal(x, decompress(compress(values(ranks - 1, (90, 40)).T.reshape(-1))).view(40, 90))

    shapes = [(0,), (3, 700), (PIECE // 2 + 31,), (5,)][:ranks]
    outs = [torch.full(shape, -1.0) for shape in shapes]
    mine = values(rank, shapes[rank])
    kept = mine.clone()
    assert compressed_all_gather(outs, mine) is None
    assert torch.equal(mine, kept)
    for r, out in enumerate(outs):
        sent = values(r, shapes[r])
        if sent.numel() < EXACT_BELOW:
            assert torch.equal(out, sent)
        else:
            parts = sent.reshape(-1).split(PIECE // ranks)
            parts = [decompress(compress(part)) if part.numel() >= EXACT_BELOW else part for part in parts]
            assert torch.equal(out.reshape(-1), torch.cat(parts))
    seen += [bits_of(out) for out in outs]

    # Segments of one length on all ranks.
    outs = [torch.empty(6000) for _ in range(ranks)]
    compressed_all_gather(outs, values(rank, (6000,)), segments=[1500, 0, 500, 4000])
    for r, out in enumerate(outs):
        a, _, b, c = values(r, (6000,)).split([1500, 0, 500, 4000])
        assert torch.equal(out, torch.cat([decompress(compress(a)), b, decompress(compress(c))]))

    # In place: what is sent is one of the outputs.
    outs = list(torch.zeros(ranks, 3000))
    outs[rank].copy_(values(rank, (3000,)))
    future = compressed_all_gather(outs, outs[rank], async_op=True)
    assert future.wait() is outs
    for r, out in enumerate(outs):
        assert torch.equal(out, decompress(compress(values(r, (3000,)))))

    nan = torch.full((3000,), float("nan")) if rank == 0 else torch.zeros(3000)
    compressed_broadcast(nan, 0)
    assert bool(nan.isnan().all())
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_broadcast_and_all_gather(ranks):
    seen = run_ranks(hand_out_everything, ranks)
    assert all(of_rank == seen[0] for of_rank in seen)


def mix_collectives(rank):
    """Sums are handed out when they are ready, which on one rank is after the broadcast was asked for, on another before."""
    x, y = values(rank, (40_000,)), values(rank, (40_000,), seed=1)
    channel = channel_of(None)
    submit = channel.adding.submit

    def submit_late(task: Task) -> None:
        complete = task.complete

        def complete_late(received):
            time.sleep(0.5)
            complete(received)

        task.complete = complete_late
        submit(task)

    if rank == 0:
        channel.adding.submit = submit_late
    first = compressed_all_reduce(x, async_op=True)
    if rank == 1:
        time.sleep(0.5)
    second = compressed_broadcast(y, 1, async_op=True)
    first.wait()
    second.wait()
    expected, _ = reduce_here([values(r, (40_000,)) for r in range(2)], [40_000], 0.5, None)
    assert torch.equal(x, expected)
    assert torch.equal(y, decompress(compress(values(1, (40_000,), seed=1))))
    return True


def test_the_order_of_collectives_does_not_depend_on_timing():
    run_ranks(mix_collectives, 2, timeout=10)


def expect(error, text, function, *args, **options):
    try:
        function(*args, **options)
    except error as raised:
        assert text in str(raised), str(raised)
    else:
        raise AssertionError(f"expected {error.__name__}")


def ask_wrongly(rank):
    x = torch.zeros(10)
    expect(TypeError, "torch.int32", compressed_all_reduce, torch.zeros(10, dtype=torch.int32))
    expect(TypeError, "torch.complex64", compressed_broadcast, torch.zeros(10, dtype=torch.complex64), 0)
    expect(TypeError, "dense", compressed_all_reduce, torch.zeros(10).to_sparse())
    expect(TypeError, "meta", compressed_all_reduce, torch.zeros(10, device="meta"))
    expect(ValueError, "MAX", compressed_all_reduce, x, dist.ReduceOp.MAX)
    expect(ValueError, "segments", compressed_all_reduce, x, segments=[5, 4])
    expect(ValueError, "segments", compressed_all_reduce, x, segments=[12, -2])
    expect(ValueError, "segments", compressed_all_reduce, x, segments=[])
    expect(ValueError, "nonfinite", compressed_all_reduce, x, config=CompressionConfig(nonfinite="raw"))
    expect(ValueError, "nonfinite", compressed_broadcast, x, 0, config=CompressionConfig(nonfinite="raw"))
    expect(ValueError, "require grad", compressed_all_reduce, torch.zeros(10, requires_grad=True))
    expect(ValueError, "rank of the group", compressed_broadcast, x, 2)
    expect(ValueError, "one for each of 2 ranks", compressed_all_gather, [x], x)
    expect(ValueError, "float64", compressed_all_gather, [x, x.double()], x)
    expect(ValueError, "strides", compressed_all_gather, [torch.zeros(3, 4).T, torch.zeros(4, 3)], torch.zeros(4, 3))
    expect(ValueError, "segments", compressed_all_gather, [x.clone(), x.clone()], x, segments=[11])
    expect(ValueError, "shape (10,)", compressed_all_gather, [torch.zeros(9)] * 2, x)
    compressed_all_reduce(x)  # what was refused has left nothing behind
    return True


def test_wrong_arguments():
    with pytest.raises(ValueError, match="init_process_group"):
        compressed_all_reduce(torch.zeros(3))
    run_ranks(ask_wrongly, 2)
