"""Recipes: their sections and fields, how they are read, overridden and written. Loads no torch; may import
types, errors and versions only.
"""

from minigrpo.config.load import dump_recipe as dump_recipe
from minigrpo.config.load import load_recipe as load_recipe
from minigrpo.config.schema import Recipe as Recipe
