"""The small model that the package builds itself, so that the quickstart needs no download, and the demonstrations
that teach it. Loads torch; may import what models may, and the rest of models.
"""
