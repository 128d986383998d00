"""Learns from vectors, judges encoders, and draws what people look at. Works on arrays and tables; knows no data set.

splits               training, validation and test sides
linear_probe         the linear probe that the classifier and the evaluation fit
metrics              confusion matrix, recalls, and means with bootstrap intervals
classifier           the specs of a classifier
classifier_scores    predictions, the votes of neurons, and the figures of the test side
classifier_report    tables of these figures
evaluation           figures of an encoder: neighbours, probes, recognition of places
instance_retrieval   whether altered views of a place find its tile
compare              two encoders query by query, and a table of all
drift                whether an encoder still gives the same tiles the same vectors
projection           the map of an encoder by UMAP
charts               maps, confusion matrices and figures as charts
pictures             sheets of tiles and sections of the volume
"""
