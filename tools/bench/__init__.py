"""Measures our steps and PyTorch's: the same shapes, the same weights, in turns on one machine.

cases       models of a few sizes, and the inputs that both sides get
model       the folder of random weights that both sides load
task        the interface of a side, and the process that serves it
ours*       our side, the programs that training runs; `flops` counts their FLOPs
peers*      PyTorch's side, `transformers` and TRL; only these import PyTorch
turns       runs the sides in turns, and checks that they compute the same
compare     which task of ours is compared with which of theirs; tables and JSON
growth      how time grows with the sizes, as tables and a picture
runner      one run of the benchmark, task by task
data        measures reading and the loader; `sources` compares copies of a dataset
saves       measures what saving adds to steps
study       the main job over several seeds
"""
