"""The doctor: what is wrong with data, said before anything is trained on it."""

from data.doctor.cleaning import Cleaned, write_cleaned
from data.doctor.diagnosis import Diagnosis, Drop
from data.doctor.examination import Examination, examined
from data.doctor.lengths import Encoder
from data.doctor.wording import describe

__all__ = ["Cleaned", "Diagnosis", "Drop", "Encoder", "Examination", "describe", "examined", "write_cleaned"]
