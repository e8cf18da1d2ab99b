"""Counts the colours of the sample photographs on however many ranks; rank 0 saves counts and class weights."""

from __future__ import annotations

import sys

import torch

from dist_colorize.color.rebalance import LossConfig, class_weights, prior
from dist_colorize.data import DataConfig, open_photographs
from dist_colorize.data.histogram import count_colours
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.stopping import StopFlag

if __name__ == "__main__":
    result, device, sample = sys.argv[1], sys.argv[2], float(sys.argv[3])
    with session(DistributedConfig(device=device)) as world, StopFlag() as stop:
        data = DataConfig(crop=64)
        photographs, _ = open_photographs(data, world, stop)
        cells = count_colours(photographs, data, sample, world, stop)
        if world.is_leader:
            torch.save({"cells": cells, "weights": class_weights(prior(cells, LossConfig()), 0.5)}, result)
