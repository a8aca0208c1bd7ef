"""Small tools that no other package owns: HTTP, Markdown, memory, process settings, random numbers, signals. May import
nothing of the package but the root's words (types, errors, versions). It has no face: import the module.
"""
