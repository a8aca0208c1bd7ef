"""Tasks, which give prompts and grade completions: opened by name, built in or a user's own. Loads no torch; may import
config, ui, sandbox, utils, types, errors and versions.
"""

from minigrpo.tasks.custom.reward_task import reward_task as reward_task
from minigrpo.tasks.registry import TASKS as TASKS
from minigrpo.tasks.registry import open_task as open_task
