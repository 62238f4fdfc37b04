"""One file per stage kind; each holds the method it is named after and `run(context) -> Result`.

The runner imports `stages.KIND` by name when the stage is due, so that looking at a run never loads a library
that trains. `python -m stages.KIND CONFIG` runs the stages of that kind alone.
"""
