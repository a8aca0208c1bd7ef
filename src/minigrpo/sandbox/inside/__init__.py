"""The code of the worker process, which loads these files alone, with nothing else of the package.

May import the standard library, and these files by relative imports: the worker is started with an empty environment
and finds this folder, but not the package around it. Both sides use `codec`.
"""
