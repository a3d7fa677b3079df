"""The command `hf-transfer`: rank backbones, fine-tune or distil by flags, upload a run folder, show results, caches.

    hf-transfer probe --models timm/resnet18.a1_in1k timm/vit_tiny_patch16_224.augreg_in21k --dataset uoft-cs/cifar10
    hf-transfer finetune --model timm/resnet18.a1_in1k --dataset uoft-cs/cifar10 --tuning lora --output_dir runs/lora
    hf-transfer distill --teacher runs/lora --model mobilenetv3_small_050 --dataset uoft-cs/cifar10
    hf-transfer report runs/lora
    hf-transfer push runs/lora me/resnet18-cifar10
    hf-transfer cache --older-than 30

On several devices: accelerate launch -m hf_transfer.cli finetune --config run.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer import __version__
from hf_transfer._clash import refuse_shared_folder
from hf_transfer.console import is_first_process, run
from hf_transfer.errors import TransferError

refuse_shared_folder()  # the downloader, installed last, replaced the __init__.py that asks first


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Bad input ends the program with one message on stderr and an exit code other than 0.

    Args:
        argv: The arguments; `sys.argv[1:]` by default.

    Raises:
        SystemExit: For bad input, and after `--help` and `--version`.
    """
    run(lambda: _command(sys.argv[1:] if argv is None else list(argv)))


def _command(argv: Sequence[str]) -> None:
    if argv[:1] == ["finetune"]:
        _finetune(argv[1:])  # its flags are the recipes': their parser, not argparse's subcommand, reads them
    elif argv[:1] == ["distill"]:
        _distill(argv[1:])
    else:
        options = _parser().parse_args(argv)
        options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-transfer", description="Transfer learning for any backbone.")
    parser.add_argument("--version", action="version", version=f"hf-transfer-learning {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("finetune", help="fine-tune a backbone on data (hf-transfer finetune --help lists the flags)")

    commands.add_parser("distill", help="distil a teacher into a student (hf-transfer distill --help lists the flags)")

    _add_probe(commands)

    report = commands.add_parser("report", help="print a run folder's results")
    report.add_argument("folder", type=Path, help="a run folder: it holds results.json")
    report.set_defaults(command=lambda options: print(results_table(options.folder)))

    push = commands.add_parser("push", help="upload a run folder to the Hugging Face Hub")
    push.add_argument("folder", type=Path, help="a run folder")
    push.add_argument("repo_id", help="user/name; made if it does not exist")
    push.add_argument("--private", action=argparse.BooleanOptionalAction, help="of a new repository")
    push.add_argument("--revision", help="branch to upload to; the main one by default")
    push.set_defaults(command=_push)

    cache = commands.add_parser("cache", help="list what is cached on this disk, or remove some of it")
    cache.add_argument("--folder", type=Path, help="where caches lie; by default where runs put them")
    cache.add_argument("--older-than", type=float, metavar="DAYS", help="only those not used for so long")
    cache.add_argument("--remove", nargs="*", metavar="NAME", help="remove these; without a name all of --older-than")
    cache.set_defaults(command=_cache)
    return parser


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser(
        "probe", help="rank backbones for data by their frozen features; nothing is fine-tuned"
    )
    probe.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="Hub ids, folders or timm names")
    probe.add_argument("--dataset", required=True, help="Hub id, folder, file or digits")
    probe.add_argument("--methods", nargs="+", metavar="METHOD", help="of linear, knn, lda, logistic; all by default")
    probe.add_argument("--folds", type=int, help="of the cross-validation, 5 by default; 0 judges validation rows")
    probe.add_argument("--image_size", type=int, help="side of the images in pixels; each backbone's own by default")
    probe.add_argument("--max_length", type=int, help="tokens a text is cut to; each backbone's own by default")
    probe.add_argument("--max_train_samples", type=int, help="probe with at most this many training rows")
    probe.add_argument("--max_eval_samples", type=int, help="look at this many rows of validation and of test")
    probe.add_argument("--input_column", help="column of the inputs; inferred by default")
    probe.add_argument("--label_column", help="column of the labels; inferred by default")
    probe.add_argument("--batch_size", type=int, help="rows a forward pass, 64 by default")
    probe.add_argument("--seed", type=int, help="of subset and folds, 0 by default")
    probe.set_defaults(command=_probe)


def _finetune(argv: Sequence[str]) -> None:
    from hf_transfer.config import parse_given
    from hf_transfer.finetune import finetune

    config, given = parse_given(argv, defaults={}, description="Fine-tunes a backbone on labelled data.")
    result = finetune(**vars(config), **given)
    if is_first_process():
        print(f"{result.folder}\n{results_table(result.folder)}")


def _distill(argv: Sequence[str]) -> None:
    from hf_transfer.config import parse_given
    from hf_transfer.distill import DistillationRun, distill
    from hf_transfer.distillation.config import DistillationConfig

    config, given = parse_given(
        argv,
        defaults={},
        description="Distils a teacher into a student on data.",
        run_config=DistillationRun,
        training_config=DistillationConfig,
    )
    result = distill(**vars(config), **given)
    if is_first_process():
        print(f"{result.folder}\n{results_table(result.folder)}")


def _probe(options: argparse.Namespace) -> None:
    from hf_transfer.frozen.probe import probe

    given = {name: value for name, value in vars(options).items() if name != "command" and value is not None}
    if given.get("folds") == 0:
        given["folds"] = None
    report = probe(given.pop("models"), given.pop("dataset"), **given)
    if is_first_process():
        print(report)


def _push(options: argparse.Namespace) -> None:
    from hf_transfer.hub.push import push

    print(push(options.folder, options.repo_id, private=options.private, revision=options.revision))


def _cache(options: argparse.Namespace) -> None:
    from hf_transfer.store import folders

    roots = [folders.default_home(home) for home in folders.HOMES] if options.folder is None else [options.folder]
    found = folders.caches_in(roots)
    if options.older_than is not None:
        found = [cache for cache in found if cache.days > options.older_than]
    if options.remove is None:
        print(cache_table(found))
        return
    for cache in folders.chosen(found, options.remove, all_of_them=options.older_than is not None):
        folders.remove(cache)
        print(f"removed {cache.folder}: {cache.size / 2**20:,.1f} MiB")


def cache_table(caches: Sequence[Any]) -> str:
    """Caches, a line each: name, kind, size, when it was last used, of what.

    Args:
        caches: What `store.folders.caches_in` found.
    """
    if not caches:
        return "no caches"
    rows = [["name", "kind", "MiB", "last used", "of"]]
    for cache in caches:
        kind = cache.kind if cache.complete else f"{cache.kind}, incomplete"
        rows.append([cache.folder.name, kind, f"{cache.size / 2**20:,.1f}", f"{cache.days:.1f} days ago", cache.about])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"{sum(cache.size for cache in caches) / 2**20:,.1f} MiB in all"])


def results_table(folder: Path) -> str:
    """The results of a run: a table of metrics by split, then every other fact on a line.

    Args:
        folder: A run folder.

    Returns:
        The lines, joined.

    Raises:
        TransferError: If the folder holds no readable results.json.
    """
    path = folder / "results.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        metrics = dict(facts.pop("metrics"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TransferError(
            f"{path} is not the results of a run ({error!r}). Give the --output_dir of one."
        ) from error
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["", *names]]
    rows += [[split, *(_text(values.get(name, "")) for name in names)] for split, values in metrics.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*table, "", *(f"{name}: {_text(value)}" for name, value in _flat(facts))])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main()
