"""What commands tell about a data set, from what its assets have made.

comparison compares encoders, provenance traces a row, and links and annotation_layer lead to Neuroglancer. dataset_check looks at
a data set before anything is made of it. housekeeping finds what nothing refers to.
"""
