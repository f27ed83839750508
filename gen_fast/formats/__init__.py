"""Readers of other packages' model directories: files in, plain dataclasses out, no model run."""
