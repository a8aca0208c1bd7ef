"""The folder of a run: its paths, manifest, logs and lock, and files that are written whole or not at all. Loads no
torch; may import config, ui, sandbox, utils, types, errors and versions.
"""

from minigrpo.runs.logger import RunLogger as RunLogger
from minigrpo.runs.manifest import fits as fits
from minigrpo.runs.manifest import read_sealed as read_sealed
from minigrpo.runs.manifest import stamp as stamp
from minigrpo.runs.manifest import write_sealed as write_sealed
from minigrpo.runs.rundir import RunDir as RunDir
