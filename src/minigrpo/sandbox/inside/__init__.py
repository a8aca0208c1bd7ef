"""What runs on the far side of the border: a worker process loads these files alone, with nothing of the package.

Only the standard library, and only relative imports: the worker is started with an empty environment and knows this
folder, but not the package around it. `codec` is spoken on both sides.
"""
