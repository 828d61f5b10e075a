"""The errors of training: one line that names the problem and the way out."""

from __future__ import annotations


class TrainError(Exception):
    """Anything the user can mend: bad data, a bad flag, an unusable folder, a diverged run."""


class DataError(TrainError):
    """The data set is missing, damaged or not the one that was expected."""


class ConfigError(TrainError):
    """A preset, field or flag value that cannot be used."""


class DeviceError(TrainError):
    """The requested device does not exist."""


class CheckpointError(TrainError):
    """A run folder or checkpoint that cannot be written, read or resumed."""


class OtherVersionError(CheckpointError):
    """A run whose settings another version of this project wrote."""


class DivergedError(TrainError):
    """A loss or a weight became NaN or infinite."""


class QualityError(TrainError):
    """Generated digits that cannot be judged."""


class StoppedError(Exception):
    """Training was told to stop, and has saved a checkpoint. Not a failure."""
