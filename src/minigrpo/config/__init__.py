"""Recipes: their sections and fields, how they are read, overridden and written. May import nothing of the package but
the root's words (types, errors, versions), and loads no torch.
"""

from minigrpo.config.load import dump_recipe as dump_recipe
from minigrpo.config.load import load_recipe as load_recipe
from minigrpo.config.schema import Recipe as Recipe
