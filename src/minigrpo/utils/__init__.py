"""Small tools that no other package owns: cache folder, HTTP, Markdown, memory, process settings, random numbers,
signals. May import types, errors and versions only. Re-exports nothing: import the module.
"""
