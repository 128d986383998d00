"""The synthetic demo: an EM-like volume and a table of synapses, generated on the user's machine.

- `demo`: writes the volume and the table.
- `tissue`: neurites and their membranes.
- `synapses`: neurons, where their synapses are, and T-bars.
- `vesicles`: vesicles, dense-core vesicles and microtubules.
- `texture`: the picture of one section.
"""
