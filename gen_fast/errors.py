"""What can go wrong, one exception type per cause. All are importable from `gen_fast`."""


class GenFastError(Exception):
    """Base of every error that gen_fast raises on purpose."""


class _RowsError(GenFastError):
    """An error of some texts. `rows`: their positions in the input."""

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows


class TextError(_RowsError, ValueError):
    """A text cannot be embedded. `rows` lists the positions of the bad texts in the input."""


class TextTypeError(TextError, TypeError):
    """A text is not a `str`."""


class PromptError(GenFastError, ValueError):
    """A prompt is unknown, or leaves no room for the text within the maximum length."""


class InputError(GenFastError, ValueError):
    """A file of texts or embeddings cannot be read; the message names the file and line or row."""


class NonFiniteError(_RowsError, ArithmeticError):
    """An embedding holds NaN or infinity. `rows` lists the positions of its texts in the input."""


class ModelNotFoundError(GenFastError, FileNotFoundError):
    """A model name, directory or Hub id was not found."""


class UnsupportedModelError(GenFastError, ValueError):
    """The model is readable, but asks for something the backbone does not compute."""


class CacheError(GenFastError, OSError):
    """What belongs into the cache of converted models cannot be written there."""


class WeightsError(GenFastError, ValueError):
    """A weight file is damaged, or a tensor is missing, misshapen or unexpected."""


class DeviceMemoryError(GenFastError, MemoryError):
    """A GPU has less free memory than a model's weights take."""


class AdapterError(GenFastError, ValueError):
    """An adapter directory is damaged, incomplete, or not an adapter."""


class BackboneMismatchError(AdapterError):
    """The adapter was trained for another backbone than the one given."""


class PrefixCacheError(GenFastError, ValueError):
    """A saved prefix cache is damaged or belongs to another model."""


class OpError(GenFastError, ValueError):
    """An op was given shapes, dtypes or options that it does not take."""


class ImplementationError(GenFastError, RuntimeError):
    """A forced implementation of an op does not exist or cannot run here."""


class ConfigError(GenFastError, ValueError):
    """A setting is unknown, or has a value that has no meaning."""


class CorpusError(GenFastError):
    """A corpus of the demo or of an evaluation could not be downloaded or read."""


class JobError(GenFastError, RuntimeError):
    """A corpus job does not match its plan, is damaged, or could not be finished."""


class CheckpointError(GenFastError, RuntimeError):
    """A training checkpoint cannot be written or read, or belongs to another run."""


class NonFiniteLossError(GenFastError, ArithmeticError):
    """The training loss stayed NaN or infinite."""
