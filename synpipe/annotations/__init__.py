"""Synapse annotations: files in known formats become one typed Arrow table, and a table of the rows that were rejected.

- `schema`: the columns of both tables, the reasons for a reject, and the name for synapses without a class.
- `formats`: the list of formats. `source` holds what they share.
- `tables`, `synister`, `synful`, `cremi`: the formats.
- `table_files`, `json_files`, `files`: how their files are read.
- `columns`: text and numbers from a file become typed columns.
- `row_checks`: which rows can be used, and why the others cannot.
- `units`, `bounds`: whether the coordinates are in the declared unit.
- `counts`: synapses and neurons of each class.
- `convert`: reads, checks and sorts the annotations of one data set.
"""
