"""The synthetic demo: an EM-like volume and a table of synapses, generated on the user's machine.

- `demo`: writes the volume and the table.
- `tissue`: neurites and their membranes.
- `synapses`: neurons, where their synapses are, and T-bars.
- `vesicles`: vesicles, dense-core vesicles and microtubules.
- `texture`: the picture of one section.

SciPy takes a second to import. Every command imports these modules for the spec of the demo, so functions import SciPy.
"""
