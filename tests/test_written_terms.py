"""Written terms are those that Python makes of the same text; what is not a term is refused and never run."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from hf_transfer import objectives, weight_schedules
from hf_transfer.errors import TransferError
from hf_transfer.objective import Objective
from hf_transfer.written_terms import SCHEDULES, TERMS, terms_from_text

REQUIRED = {"CRD": "CRD(size=20)", "TinyBERT": "TinyBERT(heads=2)"}
REQUIRED["LogitStandardization"] = "LogitStandardization(SoftTargets)"


def described(term: Objective) -> dict[str, object]:
    """Everything a term was made with, and what it wraps."""
    state = {name: value for name, value in vars(term).items() if not name.startswith("_") and name != "training"}
    inner = {name: described(child) for name, child in term.named_children() if isinstance(child, Objective)}
    tensors = {name: value.tolist() for name, value in term.state_dict().items()}
    return {"kind": type(term), **state, **tensors, **inner}


def python(text: str) -> Objective:
    """The same text run by Python."""
    return eval(text, {**vars(objectives), **vars(weight_schedules)})


@pytest.mark.parametrize(
    "text",
    [
        "SoftTargets(temperature=4.0, weight=0.9)",
        "SoftTargets(2, True, 0.5, 'kd')",
        "  DKD( )\n",
        "LogitStandardization(SoftTargets(temperature=2.0, weight=9), name='z')",
        "Hint(layers='last')",
        "Hint(layers={0.5: -1, 1.0: 'blocks.2'}, distance=\"cosine\")",
        "Hint(layers=['a', ('b', 2)])",
        "MLKD(temperatures=(2.0, 3.0))",
        "DKD(weight=LinearSchedule(0, 1, until=20 / 240), temperature=CosineSchedule(8, 1))",
        "JSD(beta=1 - 0.25 * 2 + 0, name=None)",
        "L2(weight=+1e-4)",
        "CrossEntropy(class_weights=[1, 2.5], shift=True)",
    ],
)
def test_terms_are_those_that_python_makes(text: str) -> None:
    (term,) = terms_from_text([text])
    assert described(term) == described(python(text.strip()))


def test_a_name_alone_has_its_defaults() -> None:
    first, second, third = terms_from_text(["DKD", "LogitStandardization(DKD)", "NKD(weight=SigmoidSchedule)"])
    assert described(first) == described(objectives.DKD())
    assert described(second) == described(objectives.LogitStandardization(objectives.DKD()))
    assert third.weight == weight_schedules.SigmoidSchedule()
    assert terms_from_text([]) == []


@pytest.mark.parametrize("name", objectives.__all__)
def test_every_exported_term_can_be_written(name: str) -> None:
    (term,) = terms_from_text([REQUIRED.get(name, name)])
    assert type(term) is getattr(objectives, name)


def test_every_schedule_can_be_written() -> None:
    public = {
        name: value
        for name, value in vars(weight_schedules).items()
        if inspect.isclass(value) and value.__module__ == weight_schedules.__name__
    }
    assert dict(SCHEDULES) == public
    assert set(TERMS) == set(objectives.__all__)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SoftTarget(temperature=4)", r"'SoftTarget' is neither a term nor a schedule \(did you mean SoftTargets"),
        ("softtargets", r"did you mean SoftTargets.*Terms are CKA, CRD, .*TinyBERT; schedules CosineSchedule, Lin"),
        ("DKD(weight=LinearShedule(0, 1))", r"'LinearShedule' is neither .* \(did you mean LinearSchedule"),
        ("dkd", r"did you mean DKD"),
        ("Hint(layers=last)", "'last' is neither a term.* texts such as 'last' need quotes"),
        (
            "DKD(tempertaure=2)",
            r"no argument 'tempertaure' \(did you mean temperature\?\). It is DKD\(alpha: float = 1.0",
        ),
        ("TinyBERT", r"missing a required argument: 'heads'. It is TinyBERT\(heads: int, layers: Layers"),
        ("MSE(1, 'a', 2)", r"too many positional arguments. It is MSE\(weight: float \| Schedule = 1.0"),
        ("DKD(2, alpha=1)", "multiple values for argument 'alpha'"),
        ("DKD(alpha=1, alpha=2)", "DKD is given 'alpha' twice"),
        ("SoftTargets(temperature=0)", "temperature must be > 0 and finite, or a schedule, got 0.$"),
        ("SoftTargets(temperature='4')", r"not supported.*It is SoftTargets\(temperature: float \| Schedule = 4.0"),
        (f"SoftTargets(weight=1{'0' * 400})", "int too large"),
        (
            "DKD(beta=LinearSchedule(0, 8))",
            r"'beta' of DKD takes no schedule. It is DKD\(.*temperature: float \| Sche",
        ),
        ("DKD(weight=SoftTargets)", "'weight' of DKD takes no term"),
        ("LogitStandardization(Hint())", "wraps a logit term such as SoftTargets, got Hint"),
        ("LinearSchedule(0, 1)", "a schedule is not a term. Terms are CKA"),
        ("DKD(weight=LinearSchedule(0, 1, until=2))", "needs 0 <= begin < until <= 1"),
        ("DKD, NKD", r"it is not one term, such as SoftTargets\(temperature=4.0\) or DKD"),
        ("'DKD'", "it is not one term"),
        ("DKD(", r"it cannot be read .* Write it as SoftTargets\(temperature=4.0\)"),
        ("", "it cannot be read"),
        ("DKD\0", "it cannot be read"),
        (f"DKD(weight={'(' * 500}1{')' * 500})", "it cannot be read"),
        ("weight=3", "it cannot be read"),
        ("DKD(weight=1 / 0)", "'1 / 0' has no value: division by zero"),
        ("DKD(weight=1 + 'a')", "'a'. is not a number"),
        ("DKD(weight=-True)", "'True' is not a number"),
        ("DKD(weight=2 ** 3)", r"'2 \*\* 3' is not a literal"),
        ("DKD(weight=2j)", "'2j' is not a literal"),
        ("Hint(layers=b'last')", "is not a literal"),
        ("Hint(layers=f'{DKD}')", "is not a literal"),
        ("Hint(layers={[1]: 2})", r"\[1\] is not a name or a number"),
        ("Hint(layers={**{}})", "is not a literal"),
        ("DKD(*[1])", "is not a literal"),
        ("DKD(**{'alpha': 1})", r"arguments are written out, .* not with \*\*"),
        ("DKD()()", r"'DKD\(\)' is neither a term"),
        ("Objective()", "'Objective' is neither a term"),
    ],
)
def test_what_is_not_a_term_is_refused(text: str, message: str) -> None:
    with pytest.raises(TransferError, match=message) as caught:
        terms_from_text(["DKD", text])
    assert str(caught.value).startswith(f"The term {text!r}: ")


@pytest.mark.parametrize(
    "text",
    [
        "open({path!r}, 'w')",
        "DKD(weight=open({path!r}, 'w'))",
        "DKD(name=[open({path!r}, 'w') for i in [0]])",
        "DKD(weight=(lambda: open({path!r}, 'w'))())",
        "DKD.__init__.__globals__['torch'].save(1, {path!r})",
        "torch.save(1, {path!r})",
        "DKD(weight=__import__('pathlib').Path({path!r}).touch())",
    ],
)
def test_nothing_is_run(text: str, tmp_path: Path) -> None:
    path = tmp_path / "touched"
    with pytest.raises(TransferError):
        terms_from_text([text.format(path=str(path))])
    assert not path.exists()


@pytest.mark.parametrize("texts", ["DKD", [3], ["DKD", None]])
def test_what_is_not_a_list_of_texts_is_refused(texts: list[str]) -> None:
    with pytest.raises(TransferError, match="Terms are a list of texts such as"):
        terms_from_text(texts)
