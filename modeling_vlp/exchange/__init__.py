"""Checkpoints of other libraries, both ways.

One module for each source. Its RULES say where each tensor of a vlp model stands in the source's file, and are read in
both directions (`places.py`); its `config_from` infers the configuration from the tensors' shapes. `files.py` reads
files without running code that is in them. `python -m vlp.commands.convert` puts them together. `bundle.py` lays the
package's own code beside a checkpoint, for those without vlp.
"""
