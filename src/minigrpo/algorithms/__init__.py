"""Compute the algorithm's numbers from rewards and log-probabilities: advantages, the objective and its loss, and how
groups are packed into micro-batches. Loads torch; may import config, types, errors and versions, and knows no model,
no task and no file.
"""

from minigrpo.algorithms.objective import OBJECTIVES as OBJECTIVES
from minigrpo.algorithms.objective import Objective as Objective
from minigrpo.algorithms.objective import open_objective as open_objective
from minigrpo.algorithms.packing import MicroBatch as MicroBatch
from minigrpo.algorithms.packing import pack as pack
