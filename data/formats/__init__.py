"""How a record of a data file becomes a canonical row.

A format is recognised by its columns and, where columns do not decide, by its content; more than one
candidate is an error that names them. Formats follow the names of TRL's dataset formats where it has one.

A record that breaks its format, or that nothing can be learnt from, raises `BadRow`; its kind says which.
"""

from data.formats.answers import final_answer
from data.formats.detection import FORMATS, NoFormat, detect
from data.formats.layout import Format, Record

__all__ = ["FORMATS", "Format", "NoFormat", "Record", "detect", "final_answer"]
