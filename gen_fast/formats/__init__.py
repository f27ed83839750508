"""Other packages' model directories, read and written: files and dataclasses, no model run."""
