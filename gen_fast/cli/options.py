"""Options that several commands of `gen-fast` take, and the values they may have."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from gen_fast.cli.errors import fail


class Method(StrEnum):
    """How a model's hidden states become an embedding."""

    mean = "mean"
    weighted_mean = "weighted-mean"
    last_token = "last-token"
    echo = "echo"
    hyde = "hyde"
    llm2vec_gen = "llm2vec-gen"
    sentence_transformers = "sentence-transformers"


class Dtype(StrEnum):
    """What the backbone computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    """Formats of text files."""

    txt = "txt"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"


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
PromptOption = Annotated[str | None, typer.Option(help="Instruction put before every text.")]
MaxLengthOption = Annotated[int | None, typer.Option(min=1, help="Tokens, prompt included.")]
FormatOption = Annotated[
    Format | None, typer.Option("--format", help="Of the texts.  [default: by suffix; stdin: txt]")
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


def checked_device(name: str | None) -> Any:
    """The torch.device to use; exits if this machine does not have it."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    return device
