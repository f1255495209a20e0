"""``python -m layerwise``: train, compare and probe from the command line.

An error is one line on stderr and exit code 2; Ctrl-C is 130. An interrupted training that had ``--checkpoint`` goes on with
``--resume``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import layerwise as lw
from layerwise import presets, zoo
from layerwise.compare import ENDS_TO_END
from layerwise.data import Augmentation, Loaders, TensorLoader, make_loaders
from layerwise.probes.measures import make_measures
from layerwise.probes.plots import plot_by_layer
from platonic_core import __version__
from platonic_core.command_line import Parser, run_command
from platonic_core.figures import check_format, save_figure

__all__ = ["main"]

_TRAIN_EXAMPLES = """
examples:
  python -m layerwise train --data digits --model cnn4 --method greedy2 --epochs 5
  python -m layerwise train --data mnist --data-dir ~/data --model vgg8b --width 0.25 --method predsim --save vgg.safetensors
  python -m layerwise train --data cifar10.tar.xz --augment --model resnet18 --hierarchy 1,1,2,2 --method dll --budget 0.3 \\
      --checkpoint run.pt --resume
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. `argv` is without the program's name, None means ``sys.argv[1:]``."""
    return run_command("layerwise", _make_parser, argv)


def _make_parser() -> Parser:
    parser = Parser(prog="python -m layerwise", description="Networks trained one unit at a time.")
    parser.add_argument("--version", action="version", version=f"platonic-dl {__version__}")
    parsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="{train,compare,probe}")
    train = parsers.add_parser("train", help="train a network of the zoo", epilog=_TRAIN_EXAMPLES)
    _add_data(train)
    _add_model(train)
    _add_epochs(train)
    train.add_argument("--method", default="greedy2", choices=presets.PRESETS, help="default: greedy2")
    train.add_argument(
        "--budget",
        type=float,
        help="of dll, segments, robins and transfer: share of backpropagation's memory, such as 0.3 (default: none)",
    )
    train.add_argument("--size", type=int, help="segments: units that train together (default: 2)")
    train.add_argument("--overlap", type=int, help="segments: units shared with the one before (default: size - 1)")
    train.add_argument("--code", action="store_true", help="greedy, predsim: as the papers' public code")
    train.add_argument("--lr", type=float, help="instead of the method's own")
    train.add_argument("--amp", choices=("bfloat16", "float16"), help="mixed precision")
    train.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after every epoch")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    train.add_argument("--save", type=Path, metavar="FILE", help="write the network's weights here (.safetensors)")
    train.add_argument("--history", type=Path, metavar="FILE", help="write a row per window and epoch here (.csv)")
    train.set_defaults(run=_run_train)
    compare = parsers.add_parser("compare", help="methods at one memory budget, beside backpropagation")
    _add_data(compare)
    _add_model(compare)
    _add_epochs(compare)
    compare.add_argument(
        "--methods",
        default="backprop,checkpointing,accumulation,greedy2,dll",
        help="of train, and checkpointing and accumulation, separated by commas (default: %(default)s)",
    )
    compare.add_argument("--budget", type=float, default=0.5, help="share of backpropagation's memory (default: 0.5)")
    compare.add_argument("--seeds", type=int, default=1)
    compare.add_argument("--plot", type=Path, metavar="FILE")
    compare.set_defaults(run=_run_compare)
    probe = parsers.add_parser("probe", help="measure the representations of every unit")
    _add_data(probe)
    _add_model(probe)
    probe.add_argument("--measures", default="lsd,k_redundancy,conditional_entropy,stable_rank")
    probe.add_argument("--plot", type=Path, metavar="FILE")
    probe.set_defaults(run=_run_probe)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="digits", help="name or path of images, as for python -m platonic (default: digits)"
    )
    group.add_argument("--data-dir", type=Path, help="where named sets are")
    group.add_argument("--batch", type=int, default=128, help="samples per batch (default: 128)")
    group.add_argument("--validation", type=float, default=0.1, help="share of the training samples (default: 0.1)")
    group.add_argument("--limit", type=int, help="most training samples")
    group.add_argument("--augment", action="store_true", help="random crops of 4 pixels and flips")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="cpu")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--model", default="cnn4", choices=zoo.names(), help="default: cnn4")
    group.add_argument("--width", type=float, default=1.0, help="factor of all channels (default: 1)")
    group.add_argument("--hierarchy", type=_numbers, help="layers or blocks per resolution, such as 1,1,2,2")
    group.add_argument(
        "--dropout", type=float, help="in the network; predsim: between units (default: 0; predsim: 0.2)"
    )
    group.add_argument("--weights", type=Path, metavar="FILE", help="to begin with, as --save writes them")


def _add_epochs(parser: argparse.ArgumentParser) -> None:
    text = "per unit; backprop and predsim: in all (default: 10)"
    parser.add_argument("--epochs", type=int, default=10, help=text)


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no such folder")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


def _load(args: argparse.Namespace) -> Loaders:
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device was found")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {args.limit}")
    augmentation = Augmentation(crop=4, flip=True) if args.augment else None
    loaders = make_loaders(
        args.data, data_dir=args.data_dir, batch_size=args.batch, validation=args.validation, limit=args.limit,
        augmentation=augmentation, device=args.device, seed=args.seed,
    )  # fmt: skip
    if len(loaders.shape) != 3 or loaders.shape[1] != loaders.shape[2]:
        raise ValueError(f"{args.data}: expected square images, got {loaders.shape}")
    return loaders


def _model(args: argparse.Namespace, loaders: Loaders) -> nn.Module:
    between = getattr(args, "method", None) == "predsim"  # whose dropout is the trainer's
    options: dict[str, Any] = {"width": args.width, "classes": loaders.classes}
    options["dropout"] = 0.0 if between else args.dropout or 0.0
    if args.hierarchy is not None:
        options["hierarchy"] = args.hierarchy
    try:
        model = zoo.make(args.model, in_channels=loaders.shape[0], image_size=loaders.shape[1], **options)
    except TypeError as error:
        raise ValueError(f"--model {args.model}: {error}") from None
    if args.weights is not None:
        try:
            model.load_state_dict(load_file(args.weights))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"--weights {args.weights}: {error}") from None
    return model.to(args.device)


def _layers(model: nn.Module) -> list[str]:
    try:
        return zoo.layer_names(model)
    except TypeError as error:
        raise ValueError(f"--method predsim: {error}") from None


def _method(name: str, args: argparse.Namespace) -> lw.Method:
    options: dict[str, Any] = {"epochs": args.epochs}
    if presets.takes(name, "budget") or args.budget is not None:
        options["budget"] = args.budget
    if presets.takes(name, "dropout") and args.dropout is not None:  # otherwise the network's
        options["dropout"] = args.dropout
    given = {key: getattr(args, key) for key in ("size", "overlap", "code")}
    return presets.preset(name, **options, **{key: value for key, value in given.items() if value not in (None, False)})


def _run_train(args: argparse.Namespace) -> None:
    _check_folders(args.checkpoint, args.save, args.history)
    if args.resume and args.checkpoint is None:
        raise ValueError("--resume needs --checkpoint FILE")
    method = _method(args.method, args)
    loaders = _load(args)
    torch.manual_seed(args.seed)
    model = _model(args, loaders)
    if args.lr is not None:
        method = replace(method, optimizer=replace(method.optimizer, lr=args.lr))
    trainer = lw.LayerwiseTrainer(
        model,
        method,
        classes=loaders.classes,
        spec=_layers(model) if args.method == "predsim" else "auto",
        amp=None if args.amp is None else getattr(torch, args.amp),
        checkpoint=args.checkpoint,
    )
    print(trainer.chain)
    trainer.fit(loaders.train, loaders.validation, resume=args.resume)
    rows = []
    for row in trainer.history.last_rows():
        rows.append(
            {
                "units": f"{row['first']}-{row['last']}" if row["first"] < row["last"] else row["first"],
                "epochs": row["epoch"],
                "loss": row["loss"],
                "train %": 100 * row["train_accuracy"],
                "validation %": None if row["validation_accuracy"] is None else 100 * row["validation_accuracy"],
                "test %": 100 * trainer.evaluate(loaders.test, row["last"]) if row["last"] in trainer.heads else None,
            }
        )
    print(lw.format_table(rows))
    print(f"test accuracy {100 * trainer.evaluate(loaders.test):.2f} %")
    if len(trainer.heads) > 1:
        print(f"all heads together {100 * lw.accuracy(lw.make_ensemble(trainer), loaders.test, args.device):.2f} %")
    if args.history is not None:
        trainer.history.to_csv(args.history)
    if args.save is not None:
        save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, args.save)


def _run_compare(args: argparse.Namespace) -> None:
    if args.augment:
        raise ValueError("compare gives all methods the same samples, without augmentation; leave --augment out")
    if args.dropout and "predsim" in args.methods.split(","):
        raise ValueError("--dropout: predsim drops between units, the others in the network; compare them without")
    _check_folders(args.plot)
    if args.plot is not None:
        check_format(args.plot)
    methods = args.methods.split(",")
    for name in methods:
        if name not in ENDS_TO_END:
            presets.preset(name, epochs=args.epochs)
    loaders = _load(args)
    result = lw.compare(
        partial(_model, args, loaders),
        (_whole(loaders.train), _whole(loaders.test)),
        methods,
        classes=loaders.classes,
        budget=args.budget,
        epochs=args.epochs,
        batch_size=args.batch,
        seeds=range(args.seed, args.seed + args.seeds),
        spec={"predsim": _layers(_model(args, loaders))} if "predsim" in methods else "auto",
        device=args.device,
    )
    print(result)
    if args.plot is not None:
        result.plot(args.plot)


def _whole(loader: TensorLoader) -> tuple[torch.Tensor, torch.Tensor]:
    plain = TensorLoader(loader.x, loader.y, 1024, mean=loader.mean, std=loader.std)
    inputs, labels = zip(*plain, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def _run_probe(args: argparse.Namespace) -> None:
    _check_folders(args.plot)
    if args.plot is not None:
        check_format(args.plot)
    loaders = _load(args)
    torch.manual_seed(args.seed)
    model = _model(args, loaders)
    measures = args.measures.split(",")
    table = lw.probe(model, loaders.train, measures=measures, test_loader=loaders.test, seed=args.seed)
    print(table)
    if args.plot is not None:
        columns = [
            column
            for measure in make_measures(measures)
            for i, (column, trend) in enumerate(measure.trends.items())
            if i == 0 or trend
        ]
        save_figure(plot_by_layer(table, columns), args.plot)
