"""Conversion of checkpoints from and to other libraries.

Each source has one module. Its RULES map the tensor names of a vlp model to those in the source's file, and
`places.py` applies them in both directions. Its `config_from` infers the configuration from the tensor shapes.
`files.py` reads files without running the code they may contain. The command `python -m vlp.commands.convert` combines
these modules. `bundle.py` copies the package's own code into a checkpoint folder, for users without vlp.
"""
