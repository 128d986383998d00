"""Trains networks: from scratch on unlabelled EM (pretraining), or further on labelled tiles (fine-tuning).

recipe         what `synpipe pretrain` learns from, and for how long
blocks         small stacks of sections from random places of EM volumes
views          randomly altered views of a place
pretraining    trains `d4resnet` to recognise a place in two views
held_out       measures on parts of the volumes that were not used for training
model_card     describes pretrained weights for people and for `encoders.yaml`
augmentation   random crops of tiles for fine-tuning
finetuning     trains the network of an encoder further to predict classes
curves         training curves in TensorBoard and Weights & Biases
registration   adds a trained network to `encoders.yaml`
"""
