"""Options that several commands of `gen-fast` take, and the values they may have."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gen_fast.cli.errors import fail
from gen_fast.embed.choices import METHODS
from gen_fast.io.choices import PRECISIONS, TEXT_FORMATS
from gen_fast.jobs.choices import ENGINES
from gen_fast.model.choices import DTYPES, QUANTIZED
from gen_fast.search.choices import KINDS
from gen_fast.training.choices import TRAINED

if TYPE_CHECKING:  # their values are only known when they are made below
    Method = str
    Dtype = str
    Quantized = str
    TextFormat = str
    Precision = str
    IndexKind = str
    Engine = str
    TrainedMethod = str
else:

    def _enumeration(name: str, values: Iterable[str]) -> type[StrEnum]:
        return StrEnum(name, {value.replace("-", "_"): value for value in values})

    Method = _enumeration("Method", METHODS)
    Dtype = _enumeration("Dtype", ("auto", *DTYPES))
    Quantized = _enumeration("Quantized", QUANTIZED)
    TextFormat = _enumeration("TextFormat", TEXT_FORMATS)
    Precision = _enumeration("Precision", PRECISIONS)
    IndexKind = _enumeration("IndexKind", ("auto", *KINDS))
    Engine = _enumeration("Engine", ENGINES)
    TrainedMethod = _enumeration("TrainedMethod", TRAINED)

ModelOption = Annotated[
    str | None,
    typer.Option(help="Known name, directory, .gguf file or Hub id.  [default: smollm2-135m]"),
]
MethodOption = Annotated[Method | None, typer.Option(help="Default: the model's own, else mean.")]
BackboneOption = Annotated[str | None, typer.Option(help="Where an adapter's backbone lies.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, …  [default: CUDA if any]")
]
DtypeOption = Annotated[Dtype, typer.Option(help="What the backbone computes in.")]
QuantizeOption = Annotated[
    Quantized | None, typer.Option(help="Keep the weights of the layers' linears in fewer bits.")
]
PromptOption = Annotated[str | None, typer.Option(help="Instruction put before every text.")]
MaxLengthOption = Annotated[int | None, typer.Option(min=1, help="Tokens, prompt included.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, max=1_000_000, help="Longest answer.")]
FormatOption = Annotated[
    TextFormat | None,
    typer.Option("--format", help="Of the texts.  [default: by suffix; stdin: txt]"),
]
TextColumnOption = Annotated[
    str | None, typer.Option(help="Default: text, else the only column of strings.")
]
IdColumnOption = Annotated[str | None, typer.Option(help="Default: number the rows from 0.")]
DeterministicOption = Annotated[
    bool, typer.Option("--deterministic", help="Same bits whatever else is encoded; slower.")
]
PromptNameOption = Annotated[
    str | None, typer.Option(help="One of the model's prompts: query, document, …")
]
NormalizeOption = Annotated[bool, typer.Option("--normalize", help="To L2 norm 1.")]
TruncateDimOption = Annotated[
    int | None, typer.Option(min=1, help="Keep the first dimensions only.")
]
SplitOption = Annotated[str, typer.Option(help="Of a dataset given as datasets:NAME.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Loading:
    """Options of how a model is loaded. A command that takes them is `grouped`."""

    backbone: BackboneOption = None
    device: DeviceOption = None
    dtype: DtypeOption = "auto"
    quantize: QuantizeOption = None


@dataclass(frozen=True)
class TextsIn:
    """Options of where a file has its texts. A command that takes them is `grouped`."""

    text_column: TextColumnOption = None
    id_column: IdColumnOption = None
    file_format: FormatOption = None


LOADING, TEXTS_IN = Loading(), TextsIn()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command of which a dataclass among the parameters is an option a field, in its place."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    parameters = []
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter)
            continue
        groups[parameter.name] = group
        for member in inspect.signature(group, eval_str=True).parameters.values():
            parameters.append(member.replace(default=getattr(parameter.default, member.name)))

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def checked_device(name: str | None) -> Any:
    """The torch.device to use; exits if this machine does not have it."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    return device
