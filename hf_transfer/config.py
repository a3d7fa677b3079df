"""The one command line of every recipe and of `hf-transfer finetune`: RunConfig beside TransferConfig.

    run, args = parse(defaults={"model": "timm/resnet18.a1_in1k", "learning_rate": 1e-3}, description=__doc__)

A recipe's defaults are overridden by the YAML file that `--config` names, and that by the command line. A value goes
through the same conversion wherever it stands, so `1e-3`, which YAML 1.1 reads as a string, is a number in all three.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import types
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

import yaml

from hf_transfer.errors import TransferError

if TYPE_CHECKING:
    from hf_transfer.transfer_config import TransferConfig

logger = logging.getLogger(__name__)


def flag(help: str, **default: Any) -> Any:
    """A field of a run's options, with what `--help` says of it."""
    return field(metadata={"help": help}, **default)


@dataclass
class RunConfig:
    """What to train, on what, and which part of it: the flags that stand beside those of TransferConfig.

    Args:
        model: A Hub id, a local folder, a timm name or `torchvision/<name>`.
        dataset: A Hub id, a folder (images by class, or train|validation|test.parquet/csv/jsonl), or `digits`.
        tuning: "full", "linear_probe", "partial", "gradual", "bitfit" or "lora".
        task: One of `hf_transfer.backbones.TASKS`; inferred from the data by default.
        image_size: Height and width in pixels; the model's own by default.
        max_length: Tokens a text is cut to; the model's own by default.
        max_train_samples: Train on at most this many examples.
        max_eval_samples: Evaluate on at most this many examples of each split.
        lora_r: Rank of LoRA, from 1.
        train_blocks: Which blocks `partial` trains: how many of the last ones (an int), which share of them (a float
            in (0, 1]), or their names (a comma list on the command line). Holds that int, float or tuple.
        augment: Name of an image augmentation preset.
        mixup: Alpha of mixup, from 0 (off).
        cutmix: Alpha of CutMix, from 0 (off).
        class_weights: "balanced" weighs each class by the inverse of its frequency.
        validation: Share of train, in [0, 1), that is held out where the data has no validation split.
        pretrained: Whether to start from the pretrained weights; False: the same network at random.
        input_column: Column of the inputs; inferred by default.
        label_column: Column of the labels; inferred by default.
        on_bad_example: What an unreadable example does: "raise" an error that names it, or be "skip"ped.
        cache: Whether frozen layers below those that train run once for each row, and are read from disk afterwards:
            "always", "never", or "auto", which measures both and says what it chose. Not for distillation.
        cache_views: With random augmentation, how many versions of each row are cached, from 1; epoch e trains on
            version e % views. By default "auto" does not cache augmented rows, and "always" makes 4 versions.
        cache_dtype: What is kept of each number: "float32", "bfloat16" or "float16".
        cache_dir: Where caches lie; by default beside those of the Hub, where later runs find them.
        cache_max_bytes: The most that the cache of a run may take, from 1.
        image_store: Whether images are decoded once, and their pixels read from disk afterwards: "always", "never", or
            "auto", where images would be decoded more than once and there is room. What is learnt is the same.
        image_store_dir: Where such stores lie; by default beside the Hub's caches, where later runs find them.
        image_store_max_bytes: The most that the stores of a run may take, from 1.

    Raises:
        TransferError: If a size, a count or the rank is below 1, an alpha below 0, or a choice is not one of those.
    """

    model: str = flag("Hub id, local folder, timm name or torchvision/NAME.")
    dataset: str = flag("Hub id, folder (images by class, or train|validation|test.parquet/csv/jsonl), or digits.")
    tuning: str = flag("full, linear_probe, partial, gradual, bitfit or lora.", default="full")
    task: str | None = flag("For example image-classification; inferred by default.", default=None)
    image_size: int | None = flag("Height and width in pixels; the model's own by default.", default=None)
    max_length: int | None = flag("Tokens a text is cut to; the model's own by default.", default=None)
    max_train_samples: int | None = flag("Train on at most this many examples.", default=None)
    max_eval_samples: int | None = flag("Evaluate on at most this many examples of each split.", default=None)
    lora_r: int | None = flag("Rank of LoRA.", default=None)
    # HfArgumentParser reads such a union by its second member: the command line gives a str.
    train_blocks: int | str | float | tuple[str, ...] | None = flag(
        "Blocks that partial trains: a number of the last ones, a share of them, or their names (a,b,c).", default=None
    )
    augment: str | None = flag("Image augmentation preset.", default=None)
    mixup: float = flag("Alpha of mixup; 0 is off.", default=0.0)
    cutmix: float = flag("Alpha of CutMix; 0 is off.", default=0.0)
    class_weights: Literal["balanced"] | None = flag("Weigh classes by inverse frequency.", default=None)
    validation: float = flag("Share of train that is held out where there is no validation split.", default=0.1)
    pretrained: bool = flag("Start from the pretrained weights; false: from scratch.", default=True)
    input_column: str | None = flag("Column of the inputs; inferred by default.", default=None)
    label_column: str | None = flag("Column of the labels; inferred by default.", default=None)
    on_bad_example: Literal["raise", "skip"] = flag("What an unreadable example does.", default="raise")
    cache: Literal["auto", "always", "never"] = flag("Whether frozen layers run once for each row.", default="auto")
    cache_views: int | None = flag("Augmented versions of a row in the cache.", default=None)
    cache_dtype: Literal["float32", "bfloat16", "float16"] = flag("What the cache keeps.", default="float32")
    cache_dir: str | None = flag("Folder of the caches of frozen layers.", default=None)
    cache_max_bytes: int = flag("The most that the cache of a run may take.", default=16 * 2**30)
    image_store: Literal["auto", "always", "never"] = flag("Whether images are decoded once.", default="auto")
    image_store_dir: str | None = flag("Folder of the stores of decoded images.", default=None)
    image_store_max_bytes: int = flag("The most that the image stores of a run may take.", default=16 * 2**30)

    def __post_init__(self) -> None:
        counts = ("image_size", "max_length", "max_train_samples", "max_eval_samples", "lora_r")
        for name in (*counts, "cache_views", "cache_max_bytes", "image_store_max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TransferError(f"{name}={value} is not valid: it must be a whole number from 1.")
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise TransferError(f"{name}={getattr(self, name)} is not valid: it must be a number from 0.")
        for name in ("cache", "cache_dtype", "image_store"):
            valid = get_args(get_type_hints(RunConfig)[name])
            if getattr(self, name) not in valid:
                raise TransferError(
                    f"{name}={getattr(self, name)!r} is not valid: it must be one of {', '.join(valid)}."
                )
        if isinstance(self.train_blocks, str):
            self.train_blocks = _number_or_names(self.train_blocks)

    def name_parts(self) -> tuple[str, ...]:
        """What the run folder is called after, where nobody names one."""
        return (Path(self.model).resolve().name, Path(self.dataset).resolve().name, self.tuning)


def parse(
    argv: Sequence[str] | None = None, *, defaults: Mapping[str, Any], description: str
) -> tuple[RunConfig, TransferConfig]:
    """The configuration of a run: defaults < the YAML file given by `--config` < the command line.

    Where none of them gives `output_dir`, it is `runs/<model>-<dataset>-<tuning>`.

    Args:
        argv: The arguments; `sys.argv[1:]` by default.
        defaults: The recipe's own defaults, by field name of RunConfig or TransferConfig.
        description: What `--help` says first.

    Returns:
        The run's configuration and the trainer's.

    Raises:
        TransferError: For an unknown flag or YAML key (names it and the nearest valid ones), a value of the wrong type
            (names the key and where it stands), a missing `--model` or `--dataset`, an unreadable YAML file, or a
            combination that TransferConfig refuses.
        SystemExit: After `--help`.
    """
    from hf_transfer.transfer_config import TransferConfig

    run, given = parse_given(argv, defaults=defaults, description=description)
    try:
        return run, TransferConfig(**given)
    except ValueError as error:
        raise TransferError(str(error)) from error


def parse_given(
    argv: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any],
    description: str,
    run_config: type[RunConfig] = RunConfig,
    training_config: type[TransferConfig] | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """As `parse`, but of the training arguments only those given somewhere (`output_dir` always is), by name.

    `finetune(**vars(run), **given)` runs it, with finetune's recommendations for what the user left open.

    Args:
        argv: The arguments; `sys.argv[1:]` by default.
        defaults: The recipe's own defaults.
        description: What `--help` says first.
        run_config: The class of the run's own options, such as `distill.DistillationRun`.
        training_config: The class of the training arguments; TransferConfig by default.
    """
    from hf_transfer.transfer_config import TransferConfig

    argv = sys.argv[1:] if argv is None else list(argv)
    configs = (run_config, training_config or TransferConfig)
    parser = _parser(configs, description)
    sources = _set_defaults(parser, configs, defaults, "the recipe")
    namespace, rest = parser.parse_known_args(argv)
    if namespace.config is not None:
        sources |= _set_defaults(parser, configs, _read_yaml(namespace.config), namespace.config)
        namespace, rest = parser.parse_known_args(argv)
    if rest:
        raise TransferError(_unknown_flags(rest, _names(*configs)))
    sources |= dict.fromkeys(_on_command_line(parser, argv), "the command line")
    values = vars(namespace)
    missing = [f"--{name}" for name in ("model", "dataset") if values[name] is None]
    if missing:
        raise TransferError(f"{' and '.join(missing)} must be given, on the command line or in the --config file.")
    run = run_config(**{name: values[name] for name in _names(run_config)})
    given = {name: values[name] for name in _names(configs[1]) if name in sources}
    if given.get("output_dir") is None:
        given["output_dir"] = _output_dir(run)
    for name in sources:
        logger.info("%s = %r (from %s)", name, values[name], sources[name])
    return run, given


def _parser(configs: Sequence[type], description: str) -> ArgumentParser:
    from transformers import HfArgumentParser

    from hf_transfer.schedulers import DECAYS

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise TransferError(message)  # argparse's own way prints the usage first: three hundred lines here

    usage = "%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]"  # argparse would list every flag
    parser = Parser(cast(Any, configs), description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="Values by name; the command line overrides them.")
    for action in parser._actions:  # argparse has no public way to change an argument that stands
        action.required = False  # the YAML file may give it
        if action.dest == "lr_scheduler_type" and action.choices is not None:
            action.choices = [*action.choices, *DECAYS]
    return parser


def _names(*configs: type) -> list[str]:
    return [item.name for config in configs for item in fields(config) if item.init]


def _set_defaults(
    parser: ArgumentParser, configs: Sequence[type], values: Mapping[str, Any], source: str
) -> dict[str, str]:
    """Makes `values` the parser's defaults; returns the source of each name."""
    names = _names(*configs)
    unknown = [str(name) for name in values if name not in names]
    if unknown:
        complaints = [f"unknown key {name}{_nearest(name, names)}" for name in unknown]
        raise TransferError(f"{source}: {'; '.join(complaints)}")
    hints = {name: hint for config in configs for name, hint in get_type_hints(config).items()}
    actions = {action.dest: action for action in reversed(parser._actions)}  # --flag comes before its --no_flag
    for name, value in values.items():
        try:
            parser.set_defaults(**{name: _convert(value, hints[name], actions[name])})
        except (ValueError, TypeError, ArgumentTypeError):
            valid = _valid(hints[name], actions[name])
            raise TransferError(f"{source}: {name}: {value!r} is not valid: it must be {valid}.") from None
    return dict.fromkeys(values, source)


def _convert(value: Any, hint: Any, action: Action) -> Any:
    """A value as the command line would have read it; raises ValueError, TypeError or ArgumentTypeError."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, (list, tuple)) and not {list, tuple}.isdisjoint(map(get_origin, kinds)):
        return type(value)(_scalar(item, action) for item in value)
    if isinstance(value, dict) and dict in {get_origin(kind) or kind for kind in kinds}:
        return value
    if value is None or isinstance(value, (list, tuple, dict)):
        raise TypeError
    if isinstance(value, bool) and bool not in kinds:
        if value or "no" not in (action.choices or ()):
            raise TypeError
        return "no"  # YAML 1.1 reads `eval_strategy: no` as False
    converted = _scalar(value, action)
    return [converted] if action.nargs == "+" else converted


def _scalar(value: Any, action: Action) -> Any:
    converted = action.type(str(value)) if callable(action.type) else value
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted


def _valid(hint: Any, action: Action) -> str:
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace(" | None", "")


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TransferError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise TransferError(f"--config {path} must hold lines such as `learning_rate: 1e-3`, not {values!r}.")
    return values


def _unknown_flags(rest: Sequence[str], names: Iterable[str]) -> str:
    """What to say of the arguments that the parser did not know."""
    flags = [token.partition("=")[0] for token in rest if token.startswith("-")]
    if not flags:
        return f"Unexpected {' '.join(rest)!r}: every value follows a flag, as in --model {rest[0]}."
    known = [f"--{name}" for name in (*names, "config")]
    return "; ".join(f"unknown flag {flag}{_nearest(flag, known)}" for flag in flags)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.7)
    return f", did you mean {' or '.join(near)}?" if near else " (--help lists all)"


def _on_command_line(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The names of the arguments that `argv` gives."""
    given = {token.partition("=")[0] for token in argv}
    return [action.dest for action in parser._actions if not given.isdisjoint(action.option_strings)]


def _number_or_names(text: str) -> int | float | tuple[str, ...]:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _output_dir(run: RunConfig) -> str:
    return str(Path("runs", re.sub(r"[^\w.-]+", "-", "-".join(run.name_parts()))))
