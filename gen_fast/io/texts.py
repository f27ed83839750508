"""What can be a text, or a name in one."""

from collections.abc import Sequence

from gen_fast.errors import TextError, TextTypeError


def check_texts(texts: Sequence[object]) -> None:
    """Raise TextTypeError or TextError naming the first bad row.

    Refused: anything but `str`, and lone surrogates, which have no UTF-8 form.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextTypeError(
                f"row {row}: expected str, got {type(text).__name__} ({text!r:.60})", (row,)
            )
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise TextError(
                    f"row {row}: lone surrogate {text[error.start]!a} at character {error.start} "
                    "has no UTF-8 form",
                    (row,),
                ) from error


def is_utf8(name: str) -> bool:
    """Whether a name of the system could be decoded; what could not be are lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
