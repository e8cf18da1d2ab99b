"""dist_colorize: distributed training of image colorization networks, and their use on whole archives."""

__version__ = "0.1.0"
